"""Memory, peak speed and numerics of devices, measured here or as published for known GPUs."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from pumice.errors import InputError, WorkError
from pumice.storage.memory import available_memory
from pumice.storage.yaml_file import read_yaml
from pumice.threads import fewer_threads
from pumice.train.recipe import Recipe


class GPU(NamedTuple):
    """Published figures of a GPU, a row of gpus.yaml."""

    device_name: str  # words that the driver's name of the device contains
    memory: int  # GB
    rate: int  # dense bf16 products, TFLOP/s
    fp32_part: int = 2  # plain fp32 products have one such part of that rate
    has_bf16: bool = True  # and TF32


TIMED_SIZE = {"cpu": 1024, "cuda": 4096}  # a GPU needs larger matrices to reach its peak
PACK_TOKENS = 8192  # of a pack on a GPU, where a recipe names no number


@cache
def gpus() -> dict[str, GPU]:
    """Return the GPUs of gpus.yaml by name."""
    table = read_yaml(Path(__file__).parent / "gpus.yaml", "table of GPUs")
    return {name: GPU(*values) for name, values in table.items()}


def for_device(recipe: Recipe, device_type: str) -> Recipe:
    """Return the recipe with the defaults of the device ("cpu", "cuda") in the fields that it leaves out."""
    if device_type != "cuda" or "pack_tokens" in recipe.model_fields_set:
        return recipe
    return recipe.model_copy(update={"pack_tokens": PACK_TOKENS})


@contextlib.contextmanager
def numerics(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Compute on a CUDA device as the recipe says: in fp32 or TF32, the same bits each time or not."""
    if device.type != "cuda":
        yield
        return
    before = (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    tf32 = recipe.precision == "tf32"
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32  # without this, cuDNN rounds fp32 to TF32
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
            _check_cublas(device)
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.use_deterministic_algorithms(before[2])


@contextlib.contextmanager
def enough_memory(recipe: Recipe) -> Iterator[None]:
    """Raise WorkError, which says what helps, where the memory of a GPU does not suffice for a run."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        first_try = "" if recipe.checkpointing == "full" else "set checkpointing: full to continue, or "
        raise WorkError(
            f"{recipe.name}: the GPU's memory does not suffice for packs of {recipe.pack_tokens} tokens; "
            f"{first_try}start again with pack_tokens: {recipe.pack_tokens // 2} in another output folder "
            "(`pumice plan` shows what fits)"
        ) from error


def _check_cublas(device: torch.device) -> None:
    """Raise InputError where cuBLAS was set up before it was told to be deterministic: it asks only once."""
    try:
        torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise InputError(
            "deterministic: true comes too late, because this process multiplied on the GPU before; start a "
            "new process, or set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the first product"
        ) from error


def find_gpu(name: str) -> str:
    """Return the key in `gpus` of a name, however it is written. Raises InputError if it is unknown."""
    wanted = _letters(name)
    for key, gpu in gpus().items():
        named = _letters(gpu.device_name)
        if wanted in (_letters(key), named, f"{named}{gpu.memory}g"):
            return key
    keys = {_letters(key): key for key in gpus()}
    near = [keys[letters] for letters in difflib.get_close_matches(wanted, keys, n=3, cutoff=0.7)]
    raise InputError(
        f"the figures of the GPU {name!r} are not known here; say its memory in GB with --gpu-memory, or "
        f"take one like it: {', '.join(near) or 'a100-80g, rtx4090, t4'}"
    )


def gpu_of_driver(name: str) -> GPU | None:
    """Return the figures of the GPU that a driver calls so; None if they are not known."""
    words = set(name.replace("-", " ").split())
    if words & {"Laptop", "MIG"}:  # slower than the GPU of that name, or a part of it
        return None
    return next((gpu for gpu in gpus().values() if words.issuperset(gpu.device_name.split())), None)


def _letters(name: str) -> str:
    """Return what tells a GPU from others, however its name is written: letters and digits."""
    bare = re.sub(r"[^a-z0-9]|nvidia|geforce|tesla|rtx", "", name.lower())
    return re.sub(r"(\d)gb$", r"\1g", bare)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's peak FLOP/s: the published bf16 figure, or the best of a few timed products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        gpu = gpu_of_driver(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.rate * 1e12
    # Another device is timed, with numbers from a generator of its own: the run's must not change.
    size = TIMED_SIZE.get(device.type, TIMED_SIZE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, device=device).to(dtype)
    # Take the best of several: the first runs are slow, and other programs may use the device.
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def total_memory(device: torch.device) -> float | None:
    """Return the bytes that a run may use: the GPU's, or what this machine has free; None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return available_memory()


def thread_notes(device_type: str) -> list[str]:
    """Return a note where training would be faster with fewer threads: on a CPU that others use as well."""
    threads = fewer_threads(torch.get_num_threads()) if device_type == "cpu" else None
    if threads is None:
        return []
    return [
        "other programs are busy: threads that wait for a core stop all the others, so with "
        f"OMP_NUM_THREADS={threads} training may be many times as fast"
    ]
