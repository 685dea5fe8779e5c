"""Keep arrays that are slow to compute in the cache folder, until the files that they describe change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.files import Lock, cache_folder, replacing

Arrays = dict[str, np.ndarray]

VERSION = 2  # of what is kept; another one is computed again
SMALLEST_KEPT = 1 << 20  # bytes of files whose arrays are kept: those of smaller files take milliseconds
_WAIT = 0.2  # seconds between two looks at what another process computes


def kept(files: Sequence[Path], purpose: str, build: Callable[[], Arrays]) -> Arrays:
    """Return what `build` returns, from the cache if it was built for the same files in the same state.

    files: their sizes and times tell whether they changed. purpose: what else the arrays depend on. If
    several processes ask at once, one computes and the others wait for it.
    """
    stats = [os.stat(file) for file in files]
    stamp = np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], np.int64).reshape(-1, 2)
    if stamp[:, 0].sum() < SMALLEST_KEPT:
        return build()
    text = "\0".join([str(VERSION), purpose, *(str(file.absolute()) for file in files)])
    name = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    path = cache_folder() / "data" / f"{name}.npz"
    if (arrays := _load(path, stamp)) is not None:
        return arrays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path.with_suffix(".lock"))
    except OSError:  # a cache that cannot be written only costs time
        return build()
    with lock:
        while not lock.acquire():
            time.sleep(_WAIT)
        if (arrays := _load(path, stamp)) is None:
            arrays = build()
            stored: dict[str, Any] = {"stamp": stamp, **arrays}
            with contextlib.suppress(OSError), replacing(path) as file:
                np.savez(file.buffer, **stored)
    return arrays


def _load(path: Path, stamp: np.ndarray) -> Arrays | None:
    """Return the arrays of a file, None if it is missing, damaged, or of files in another state."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            return {name: stored[name] for name in stored.files if name != "stamp"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
