"""Memory and peak speed of devices, measured here or as published for known GPUs."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from pumice.storage.memory import available_memory


class GPU(NamedTuple):
    """Published figures of a GPU."""

    device_name: str  # words that the driver's name of the device contains
    memory: int  # GB
    rate: int  # dense bf16 products, TFLOP/s


GPUS = {
    "a10": GPU("A10", 24, 125), "a10g": GPU("A10G", 24, 70), "a100-40g": GPU("A100", 40, 312),
    "a100-80g": GPU("A100", 80, 312), "h100": GPU("H100", 80, 989), "h200": GPU("H200", 141, 989),
    "b200": GPU("B200", 180, 2250), "l4": GPU("L4", 24, 121), "l40s": GPU("L40S", 48, 362),
    "rtx3090": GPU("RTX 3090", 24, 71), "rtx4090": GPU("RTX 4090", 24, 165),
    "rtx5090": GPU("RTX 5090", 32, 209), "rtx6000-ada": GPU("RTX 6000 Ada", 48, 364),
}  # fmt: skip


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's peak FLOP/s: the published bf16 figure, or the best of a few timed products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
        for gpu in GPUS.values():
            if words.issuperset(gpu.device_name.split()):
                return gpu.rate * 1e12
    # Another device is timed. A GPU needs larger matrices than a CPU to reach its peak.
    size = 4096 if device.type == "cuda" else 1024
    with torch.random.fork_rng(devices=[]):  # the run's random state must not change
        matrix = torch.nn.init.normal_(torch.empty(size, size, device=device, dtype=dtype))
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
