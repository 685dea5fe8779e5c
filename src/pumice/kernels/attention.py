"""Attention in compiled code: of prompts over a KV cache in bfloat16, and of the patches of tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pumice.errors import WorkError
from pumice.kernels.compute import library

LANES = 16  # head widths must be multiples of it, as in vectors.h


class _TaskStruct(ctypes.Structure):
    """`Task` of attend.c."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_head", ctypes.c_int64),
        ("q_token", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ["block", "capacity", "past", "tokens", "window", "heads", "kv_heads", "size"]
        ),
        ("y", ctypes.c_void_p),
    ]


def can_attend(q: Tensor, keys: Tensor) -> bool:
    """Return whether `attend` takes these queries and this cache."""
    on_cpu = q.device.type == "cpu" and q.dtype == torch.float32 and keys.dtype == torch.bfloat16
    fits = q.shape[-1] % LANES == 0 and q.stride(-1) == 1 and not q.requires_grad
    return on_cpu and fits and library() is not None


def attend(
    q: Tensor, keys: Tensor, values: Tensor, table: Sequence[int], block: int, past: int, window: int | None
) -> Tensor:
    """Attend with rotated queries of one sequence's new tokens, whose keys and values are in the cache.

    q: (1, H, T, d) fp32. keys, values: (K, C, d) bf16, contiguous. table: the sequence's blocks of `block`
    cells. past: its earlier tokens. window: a token sees so many, itself included. Return (1, H, T, d). Raise
    WorkError if C cannot allocate its buffers.
    """
    code = library()
    assert code is not None
    _, heads, tokens, size = q.shape
    y = torch.empty(1, tokens, heads, size)
    blocks = (ctypes.c_int64 * len(table))(*table)
    task = _TaskStruct(
        q.data_ptr(), q.stride(1), q.stride(2), keys.data_ptr(), values.data_ptr(), ctypes.addressof(blocks),
        block, keys.shape[1], past, tokens, window or 0, heads, len(keys), size, y.data_ptr(),
    )  # fmt: skip
    if code.pumice_attend(ctypes.byref(task), torch.get_num_threads()):
        raise WorkError(f"no memory is left for the attention of {tokens} tokens")
    return y.transpose(1, 2)


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Let each patch of a tile attend to all patches of its tile, where `can_multiply` (compute.py).

    q, k, v: (B, T, C) fp32, for B tiles of T patches, the heads of a patch one after the other. Return
    (B, T, C). Products are of bfloat16 where the processor multiplies it. Raise WorkError if C cannot
    allocate its buffers.
    """
    code = library()
    assert code is not None
    tiles, patches, width = q.shape
    if width % heads or any((x.shape, x.dtype) != (q.shape, torch.float32) for x in (q, k, v)):
        given = ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in (q, k, v))
        raise ValueError(f"expected three tensors (B, T, {heads} * d) of fp32, not {given}")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y = torch.empty_like(q)
    sizes = (ctypes.c_int64(size) for size in (tiles, patches, heads, width // heads))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, y))
    if code.pumice_attend_tiles(*pointers, *sizes, torch.get_num_threads()):
        raise WorkError(f"no memory is left for the attention of {patches} patches")
    return y
