"""Memory, peak speed and numerics of devices, measured here or as published for known GPUs."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pumice.errors import InputError
from pumice.storage.memory import available_memory
from pumice.train.recipe import Recipe


class GPU(NamedTuple):
    """Published figures of a GPU."""

    device_name: str  # words that the driver's name of the device contains
    memory: int  # GB
    rate: int  # dense bf16 products, TFLOP/s
    fp32_share: float = 1 / 2  # of that rate, for plain fp32 products; 1 / 2 on most GeForce cards
    has_bf16: bool = True  # and TF32: both came with Ampere


# Of two names of which one holds the other, the longer comes first; of one GPU with several sizes of memory,
# the smaller. Rates are those of NVIDIA's data sheets and architecture whitepapers, without sparsity and with
# sums in fp32. T4, V100 and RTX 20 have no bf16: their figure is that of fp16.
GPUS = {
    "a10": GPU("A10", 24, 125, 1 / 4), "a10g": GPU("A10G", 24, 70), "a100-40g": GPU("A100", 40, 312, 1 / 16),
    "a100-80g": GPU("A100", 80, 312, 1 / 16), "h100-pcie": GPU("H100 PCIe", 80, 756, 1 / 15),
    "h100": GPU("H100", 80, 989, 1 / 15), "h200": GPU("H200", 141, 989, 1 / 15),
    "b200": GPU("B200", 180, 2250, 1 / 30), "l4": GPU("L4", 24, 121, 1 / 4),
    "l40s": GPU("L40S", 48, 362, 1 / 4), "l40": GPU("L40", 48, 181),
    "a30": GPU("A30", 24, 165, 1 / 16), "a40": GPU("A40", 48, 150, 1 / 4),
    "t4": GPU("T4", 16, 65, 1 / 8, False), "v100-16g": GPU("V100", 16, 125, 1 / 8, False),
    "v100-32g": GPU("V100", 32, 125, 1 / 8, False),
    "rtx2080ti": GPU("RTX 2080 Ti", 11, 54, 1 / 4, False), "rtx3060ti": GPU("RTX 3060 Ti", 8, 32),
    "rtx3060": GPU("RTX 3060", 12, 25), "rtx3070ti": GPU("RTX 3070 Ti", 8, 43),
    "rtx3070": GPU("RTX 3070", 8, 41), "rtx3080ti": GPU("RTX 3080 Ti", 12, 68),
    "rtx3080": GPU("RTX 3080", 10, 60), "rtx3090ti": GPU("RTX 3090 Ti", 24, 80),
    "rtx3090": GPU("RTX 3090", 24, 71), "rtx4060ti-8g": GPU("RTX 4060 Ti", 8, 44),
    "rtx4060ti-16g": GPU("RTX 4060 Ti", 16, 44),
    "rtx4060": GPU("RTX 4060", 8, 30), "rtx4070ti-super": GPU("RTX 4070 Ti SUPER", 16, 88),
    "rtx4070ti": GPU("RTX 4070 Ti", 12, 80), "rtx4070-super": GPU("RTX 4070 SUPER", 12, 71),
    "rtx4070": GPU("RTX 4070", 12, 58), "rtx4080-super": GPU("RTX 4080 SUPER", 16, 104),
    "rtx4080": GPU("RTX 4080", 16, 97), "rtx4090": GPU("RTX 4090", 24, 165),
    "rtx5060ti-8g": GPU("RTX 5060 Ti", 8, 47), "rtx5060ti-16g": GPU("RTX 5060 Ti", 16, 47),
    "rtx5070ti": GPU("RTX 5070 Ti", 16, 88), "rtx5070": GPU("RTX 5070", 12, 62),
    "rtx5080": GPU("RTX 5080", 16, 113), "rtx5090": GPU("RTX 5090", 32, 209),
    "rtx-a4000": GPU("RTX A4000", 16, 77, 1 / 4), "rtx-a5000": GPU("RTX A5000", 24, 111, 1 / 4),
    "rtx-a6000": GPU("RTX A6000", 48, 155, 1 / 4), "rtx6000-ada": GPU("RTX 6000 Ada", 48, 364, 1 / 4),
}  # fmt: skip


TIMED_SIZE = {"cpu": 1024, "cuda": 4096}  # a GPU needs larger matrices to reach its peak
PACK_TOKENS = 8192  # of a pack on a GPU, where a recipe names no number


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
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        torch.use_deterministic_algorithms(before[2])


def find_gpu(name: str) -> str:
    """Return the key in GPUS of a name, however it is written. Raises InputError if it is unknown."""
    wanted = _letters(name)
    for key, gpu in GPUS.items():
        named = _letters(gpu.device_name)
        if wanted in (_letters(key), named, f"{named}{gpu.memory}g"):
            return key
    keys = {_letters(key): key for key in GPUS}
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
    return next((gpu for gpu in GPUS.values() if words.issuperset(gpu.device_name.split())), None)


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
