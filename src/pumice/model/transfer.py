"""Move small tensors from the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device. To CUDA it is copied from pinned memory, beside the compute."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def numbers_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers of Python as a tensor on a device."""
    return to_device(torch.tensor(values, dtype=dtype), device)
