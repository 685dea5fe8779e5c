"""Attention over sequences of different lengths in one call: FlashAttention's kernel, as PyTorch brings it.

It needs CUDA, a GPU since Ampere, 16 bits, and a PyTorch that has the kernel and the arguments used here.
Where one of these is missing, the caller attends sequence by sequence.

Shapes: T tokens of all sequences, H heads, K key/value heads, d head dimension, N sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 and FlashAttention 2
WIDEST_HEAD = 256
_ARGUMENTS = {"window_size", "enable_gqa"}
_PAGED_ARGUMENTS = {"seqused_k", "block_table"}  # for keys that lie in the blocks of a cache
PAGE = 256  # tokens of a block: the kernel takes multiples of it


@lru_cache(maxsize=1)
def _function() -> tuple[Callable[..., Any] | None, frozenset[str]]:
    """Return PyTorch's function and the names of its arguments; None before PyTorch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@lru_cache(maxsize=8)
def is_recent(device: torch.device) -> bool:
    """Return whether a CUDA device computes in bfloat16 and has FlashAttention: Ampere or later."""
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def can_attend(device: torch.device, dtype: torch.dtype, head_dim: int, *, paged: bool = False) -> bool:
    """Return whether the kernel takes queries like these. paged: with keys in the blocks of a cache."""
    needed = _ARGUMENTS | _PAGED_ARGUMENTS if paged else _ARGUMENTS
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= WIDEST_HEAD
        and needed <= _function()[1]
        and torch.backends.cuda.is_flash_attention_available()  # PyTorch may be built without it
        and is_recent(device)
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor | None, longest: int,
    longest_keys: int, window: int | None, **paged: Tensor,
) -> Tensor:  # fmt: skip
    """Attend causally, each sequence to itself; its last query sees its last key. Return (1, H, T, d).

    q (1, H, T, d); k and v (keys, K, d), or (blocks, block, K, d) with `paged`. starts, key_starts: (N + 1,)
    int32, where sequences begin. window: as in `causal_mask`. paged: seqused_k (N,) and block_table, int32.
    """
    function, _ = _function()
    assert function is not None
    mixed: Tensor = function(
        q[0].transpose(0, 1), k, v, starts, key_starts, longest, longest_keys,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[-2], **paged,
    )  # fmt: skip
    return mixed.transpose(0, 1)[None]
