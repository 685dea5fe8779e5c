"""Keep memory that PyTorch frees on a CPU for the next step, or give it back, by functions of glibc."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MAX_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_MAX_INT = 2**31 - 1

_limits = [0]  # bytes that each successful call allowed the process to keep; they only grow


def keep_freed_memory(limit: int | None = None) -> bool:
    """Keep memory that a step frees for the next step. Return whether the C library agreed.

    On a CPU, every large tensor is otherwise mapped, zeroed page by page, and unmapped again: a tenth of the
    time of a prompt. limit: bytes to keep; tensors of more than 32 MB are not kept. None keeps all memory.

    Works with glibc only. The user's own settings (MALLOC_ variables, a preloaded allocator) win, and so does
    an earlier call with a higher limit.
    """
    if not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    keep_bytes = _MAX_INT if limit is None else limit
    if keep_bytes <= _limits[-1]:
        return True
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    # glibc before 2.35 refuses a threshold beyond 32 MB. So to keep all memory, turn mapping off.
    accepted = mallopt(_MMAP_MAX, 0) if limit is None else mallopt(_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
    if not (accepted and mallopt(_TRIM_THRESHOLD, keep_bytes)):
        return False
    _limits.append(keep_bytes)
    return True


def return_freed_memory() -> None:
    """Give back what is free between tensors that stay, such as after weights were replaced one by one.

    Works with glibc only.
    """
    if sys.platform.startswith("linux") and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))
