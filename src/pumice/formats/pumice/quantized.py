"""Read and write the quantised matrices of a Pumice folder, in the layout that the kernels read.

    quantized.safetensors   a matrix's bytes as one U8 tensor, by its name in `pumice.model`
    quantized.json          {"layout": 1, "matrices": {name: {"kind": "Q4_K", "shape": [outputs, inputs]}}}

Opening maps the file: nothing is converted or copied. The layout is that of `kernels/packed.h`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from pumice.errors import InputError
from pumice.files import cache_folder, folder_size, sync
from pumice.kernels.packed import LAYOUT, BlockFormat, PackedMatrix, packed_size
from pumice.storage.json_file import read_json, write_json
from pumice.storage.tensors import Blocks, LazyStateDict, LazyTensor, open_file, write_file

FILE, INDEX = "quantized.safetensors", "quantized.json"
_SCRATCH = ".new-"  # begins the names of copies that are being written
ABANDONED = 24 * 3600.0  # seconds after which such a copy is what a killed process left
CACHE_GB, LIMIT_VARIABLE = 20, "PUMICE_CACHE_LIMIT"
_LOG = logging.getLogger("pumice")


def as_bytes(state: LazyStateDict) -> LazyStateDict:
    """Return the quantised matrices of a state as the file stores them: (bytes,) uint8 each, read later."""
    return {
        name: _bytes(tensor, tensor.blocks) for name, tensor in state.items() if tensor.blocks is not None
    }


def write_quantized(folder: Path, state: LazyStateDict) -> None:
    """Write both files, or none if no matrix is quantised. One matrix at a time is in memory."""
    matrices = {
        name: {"kind": tensor.blocks.kind.name, "shape": list(tensor.shape)}
        for name, tensor in state.items()
        if tensor.blocks is not None
    }
    if matrices:
        write_file(folder / FILE, as_bytes(state))
        write_json(folder / INDEX, {"layout": LAYOUT, "matrices": matrices})


def open_quantized(folder: Path) -> LazyStateDict:
    """Return the folder's quantised matrices, {} if it has none. Raises InputError if the files disagree."""
    index = folder / INDEX
    if not index.exists():
        if (folder / FILE).exists():
            raise InputError(
                f"{index} is missing, which describes {FILE}; copy it, or import the model again"
            )
        return {}
    described = read_json(index, "its matrices cannot be read")
    if (layout := described.get("layout")) != LAYOUT:
        raise InputError(
            f"{index} says layout {layout!r}, this version of Pumice reads layout {LAYOUT}; "
            "import the model again with --quantize"
        )
    tensors = open_file(folder / FILE)
    matrices = described.get("matrices")
    if not isinstance(matrices, dict) or matrices.keys() != tensors.keys():
        raise InputError(f"{index} and {FILE} do not name the same matrices; import the model again")
    return {name: _stored(name, tensors[name], entry, index) for name, entry in matrices.items()}


def cached(key: str, state: LazyStateDict, limit: float | None = None, label: str = "") -> LazyStateDict:
    """Return the state with its quantised matrices read from the cache, where they are stored first.

    key: a hash of all that determines the matrices. limit: the bytes that the cache may take; None: as
    `cache_limit` says. label: names the source in a message on the first storing, "" for none. If they are
    too large for the cache, or it cannot be written, the state is returned unchanged. Older copies beyond the
    limit are removed.
    """
    folder = copies_folder() / key
    limit = cache_limit() if limit is None else limit
    try:
        size = sum(tensor.size for tensor in as_bytes(state).values())
        folder.parent.mkdir(parents=True, exist_ok=True)
        if reason := _too_large(size, limit, folder):
            if label:
                _LOG.warning("%s is converted at every start: %s", label, reason)
            shutil.rmtree(folder, ignore_errors=True)
            _trim(limit, folder)
            return state
        if not folder.exists():
            if label:
                _LOG.warning("%s", _announcement(label, size, state, folder))
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder.parent) as scratch:
                fresh = Path(scratch) / "new"
                fresh.mkdir()
                write_quantized(fresh, state)
                for path in fresh.iterdir():
                    sync(path)
                fresh.rename(folder)
        os.utime(folder)  # its last use
        _trim(limit, folder)
        return state | open_quantized(folder)
    except OSError as error:
        _LOG.info("quantised weights are not kept in %s: %s", folder, error.strerror)
        return state
    except InputError:  # damaged: the next start makes it again
        shutil.rmtree(folder, ignore_errors=True)
        return state


def copies_folder() -> Path:
    """Return the folder of the cache that holds matrices in the layout that the kernels read."""
    return cache_folder() / "quantized"


def cache_limit() -> float:
    """Return how many bytes these copies may take together: $PUMICE_CACHE_LIMIT in GB, or CACHE_GB."""
    given = os.environ.get(LIMIT_VARIABLE, "")
    try:
        gigabytes = float(given or CACHE_GB)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise InputError(f"{LIMIT_VARIABLE} is {given!r}; give a number of GB, 0 or more")
    return gigabytes * 1e9


def _too_large(size: int, limit: float, folder: Path) -> str | None:
    """Return why a copy of `size` bytes is not kept in `folder`, or None."""
    if size > limit:
        return (
            f"its copy would take {size / 1e9:.1f} GB, and the cache is limited to {limit / 1e9:g} GB "
            f"(--cache-limit, {LIMIT_VARIABLE})"
        )
    free = shutil.disk_usage(folder.parent).free
    if size > free and not folder.exists():
        return f"its copy would take {size / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB left"
    return None


def _announcement(label: str, size: int, state: LazyStateDict, folder: Path) -> str:
    """Say what is stored, and what it loses."""
    before = sum(tensor.stored_bytes for tensor in state.values() if tensor.blocks is not None)
    changes = rounded(state)
    return (
        f"{label} is converted once, from {before / 1e9:.2f} to {size / 1e9:.2f} GB in "
        f"{folder}{changes and f'; {changes}'}"
    )


def rounded(state: LazyStateDict) -> str:
    """Say which types of a GGUF file are held in another one, and what that loses; "" if none is."""
    changed = {
        (tensor.stored_as, tensor.blocks.kind)
        for tensor in state.values()
        if tensor.blocks is not None and tensor.stored_as not in ("", tensor.blocks.kind.name)
    }
    losses = {BlockFormat.Q8_0: "within 0.4 % of the largest of 32 weights"}
    return ", ".join(
        f"{stored} is held as {kind.name} ({losses.get(kind, 'rounded to 4 bits')})"
        for stored, kind in sorted(changed, key=lambda change: (change[0], change[1].name))
    )


def _trim(limit: float, kept: Path) -> None:
    """Remove the copies not used for longest, except `kept`, until all take at most `limit` bytes.

    Copies that were never finished are removed as well.
    """
    others = [path for path in kept.parent.iterdir() if path != kept]
    for path in others:
        if path.name.startswith(_SCRATCH) and _last_use(path) < time.time() - ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
    finished = (path for path in others if not path.name.startswith(_SCRATCH))
    copies = sorted(finished, key=_last_use)
    sizes = {path: folder_size(path) for path in (*copies, kept)}
    for path in copies:
        if sum(sizes.values()) <= limit:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]


def _last_use(copy: Path) -> float:
    """Return the time of a copy's last use; infinity if another process removes or renames it just now."""
    try:
        return copy.stat().st_mtime
    except OSError:
        return math.inf


def _bytes(tensor: LazyTensor, blocks: Blocks) -> LazyTensor:
    outputs, inputs = tensor.shape
    return LazyTensor(
        (packed_size(blocks.kind, outputs, inputs),), torch.uint8, lambda _: blocks.fetch().data
    )


def _stored(name: str, data: LazyTensor, entry: object, index: Path) -> LazyTensor:
    kind, shape = _described(entry)
    if kind is None or data.dtype != torch.uint8 or data.shape != (packed_size(kind, *shape),):
        raise InputError(
            f"{index} says {entry!r} of {name}, which is not what {FILE} holds; import the model again"
        )

    def packed() -> PackedMatrix:
        return PackedMatrix(kind, *shape, data.read())

    def restored(dtype: torch.dtype) -> Tensor:
        return packed().restored(dtype)

    return LazyTensor(shape, torch.float32, restored, data.origin, Blocks(kind, packed, mapped=True))


def _described(entry: object) -> tuple[BlockFormat | None, tuple[int, int]]:
    """Return a matrix's kind and shape; the kind is None if the entry is not valid."""
    match entry:
        case {"kind": str(name), "shape": [int(outputs), int(inputs)]} if outputs > 0 and inputs > 0:
            kind = BlockFormat.__members__.get(name)
            if kind is not None and inputs % kind.block == 0:
                return kind, (outputs, inputs)
    return None, (0, 0)
