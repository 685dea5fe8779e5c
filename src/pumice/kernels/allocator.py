"""Keep memory that PyTorch frees on a CPU for the next step, by settings of glibc (`mallopt`)."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's parameters, of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST_THRESHOLD = 32 * 2**20  # that glibc takes
_ALL = 2**31 - 1

_kept = [0]  # bytes, by each call that was obeyed


def keep_freed_memory(most: int | None = None) -> bool:
    """Have the C library keep what a step frees for the next one, instead of asking the system anew.

    On a CPU every large tensor is otherwise mapped, zeroed page by page, and unmapped again: a tenth of the
    time of a prompt. most: bytes to keep at most, tensors beyond 32 MB not among them; None for all, however
    large. glibc only; settings of the user's own (MALLOC_ variables, another allocator preloaded) stand,
    and so does a call for more. Whether it was done.
    """
    if not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    wanted = _ALL if most is None else most
    if wanted <= _kept[-1]:
        return True
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    # glibc before 2.35 refuses a threshold beyond 32 MB: for all, nothing is mapped at all
    large = mallopt(_MMAP_MAX, 0) if most is None else mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    if not (large and mallopt(_TRIM_THRESHOLD, wanted)):
        return False
    _kept.append(wanted)
    return True
