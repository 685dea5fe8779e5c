"""Tensors in files: known by their headers, read one at a time, written one at a time.

Knows: safetensors and `.bin`, whole or in shards with an index. Does not know: what a tensor is for.
A `.bin` is a pickle; torch's restricted reader (`weights_only`) takes tensors from it and runs no code.

A tensor is read by mapping its file into memory: where its type stays, its bytes are not copied.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pumice.errors import InputError
from pumice.kernels.packed import Kind, Packed
from pumice.storage.json_file import Keys

SHARD_BYTES = 5 * 10**9
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # what we write, and compute in

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_WRITTEN = FLOATS | {torch.uint8: "U8"}
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Blocks:
    """How a matrix is had in blocks of few bits, which its floats are made of."""

    kind: Kind
    fetch: Callable[[], Packed]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still where it is kept.

    fetch: reads it, in the type that it is given. origin: key and file, for messages. blocks: where a matrix
    is stored in few bits, or is to be; whatever changes its values drops them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[torch.dtype], Tensor]
    origin: str = ""
    blocks: Blocks | None = None

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, as stored or in `dtype`."""
        return self.fetch(dtype or self.dtype)

    def then(self, change: Callable[[Tensor], Tensor], shape: Iterable[int] | None = None) -> LazyTensor:
        """This tensor after `change`, which sees it as stored. shape: of the result, where it differs."""
        return LazyTensor(
            self.shape if shape is None else tuple(shape),
            self.dtype,
            lambda dtype: change(self.read()).to(dtype),
            self.origin,
        )

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """This tensor as if it were stored in `dtype`."""
        return LazyTensor(self.shape, dtype, self.fetch, self.origin)

    @property
    def size(self) -> int:
        """Bytes, as stored."""
        return math.prod(self.shape) * self.dtype.itemsize


LazyStateDict = dict[str, LazyTensor]


def stored(tensor: Tensor, origin: str = "") -> LazyTensor:
    """A tensor in memory."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.to, origin)


def find_weights(folder: Path, stem: str = "") -> list[Path]:
    """The files that hold a folder's weights, the best kind first: safetensors, then `.bin`; [] if none.

    An index is returned alone. stem: of the files' names; `model` and `pytorch_model` when not given.
    """
    for name in (stem,) if stem else ("model", "pytorch_model"):
        for ending in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin"):
            if (folder / f"{name}{ending}").is_file():
                return [folder / f"{name}{ending}"]
    return []


def open_weights(folder: Path, stem: str = "") -> LazyStateDict:
    """All tensors of a folder's weights. Raises InputError when there are none, or a file of them is bad."""
    found = find_weights(folder, stem)
    if not found:
        loose = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        hint = f"; {loose[0]} is there, but no index that names it" if loose else ""
        raise InputError(f"{folder} holds no weights: neither safetensors nor .bin{hint}")
    path = found[0]
    return _open_index(path) if path.suffix == ".json" else open_file(path)


def open_file(path: Path) -> LazyStateDict:
    """The tensors of one file, in its order."""
    reader = _Safetensors(path) if path.suffix == ".safetensors" else _Bin(path)
    return {name: reader.stored(name) for name in reader.names()}


def _open_index(index: Path) -> LazyStateDict:
    """The tensors that an index deals out to shards, shard by shard."""
    where: dict[str, list[str]] = {}
    for name, shard in Keys.of(index).object("weight_map").values.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index} puts {name} into {shard!r}, which is no file name")
        where.setdefault(shard, []).append(name)
    if not where:
        raise InputError(f"{index} names no tensors; fetch it again")
    tensors: LazyStateDict = {}
    for shard, names in sorted(where.items()):
        path = index.parent / shard
        if not path.is_file():
            raise InputError(f"{index} names {shard}, which is not beside it; fetch that file as well")
        found = open_file(path)
        if missing := [name for name in names if name not in found]:
            raise InputError(f"{index} says that {missing[0]} is in {shard}, which does not hold it")
        if extra := [name for name in found if name not in names]:
            raise InputError(f"{path} holds {extra[0]}, which {index.name} does not name")
        tensors |= found
    return tensors


class _File:
    """One file of tensors. It is open only while tensors are read from it one after another."""

    _last: _File | None = None  # only one file is open at a time, so that only its pages are in memory

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None

    def opened(self) -> Any:
        if self._opened is None:
            if _File._last is not None:
                _File._last._opened = None
            self._opened, _File._last = self._open(), self
        return self._opened

    def stored(self, name: str) -> LazyTensor:
        shape, dtype = self._describe(name)
        return LazyTensor(
            shape, dtype, lambda wanted: self._read(name).to(wanted), f"{name} in {self.path.name}"
        )

    def names(self) -> list[str]:
        raise NotImplementedError

    def _open(self) -> Any:
        raise NotImplementedError

    def _describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        raise NotImplementedError

    def _read(self, name: str) -> Tensor:
        raise NotImplementedError

    def _bad(self, error: Exception, what: str = "") -> InputError:
        """What is wrong with a file that could not be read. what: in words, where the error has none."""
        try:
            with self.path.open("rb") as file:
                start = file.read(len(_LFS))
        except OSError as unreadable:
            return InputError(f"{self.path} cannot be read: {unreadable.strerror}")
        if start == _LFS:
            return InputError(
                f"{self.path} is a pointer of Git LFS, not the weights; run `git lfs pull` there"
            )
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return InputError(f"{self.path} is {what or f'damaged or cut short ({reason})'}; fetch it again")


def close_last_file() -> None:
    """Close the file that was read last: its pages count as this process's memory while it is open."""
    last, _File._last = _File._last, None
    if last is not None:
        last._opened = None


class _Safetensors(_File):
    def names(self) -> list[str]:
        return list(self.opened().keys())

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._bad(error) from error

    def _describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        part = self.opened().get_slice(name)
        if (dtype := _DTYPES.get(part.get_dtype())) is None:
            raise InputError(f"{self.path}: {name} is stored as {part.get_dtype()}, which cannot be read")
        return tuple(part.get_shape()), dtype

    def _read(self, name: str) -> Tensor:
        try:
            return self.opened().get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._bad(error) from error


class _Bin(_File):
    def names(self) -> list[str]:
        return list(self.opened())

    def _open(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # torch muses on how a stranger's pickle was made
                state = self._load()
        except pickle.UnpicklingError as error:
            what = "refused: it is damaged, or holds more than tensors, and code in it is never run"
            raise self._bad(error, what) from error
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise self._bad(error) from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise InputError(f"{self.path} does not hold named tensors, so it is no checkpoint")
        return state

    def _load(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(self.path, map_location="cpu", weights_only=True)  # written before PyTorch 1.6

    def _describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        tensor = self.opened()[name]
        return tuple(tensor.shape), tensor.dtype

    def _read(self, name: str) -> Tensor:
        return self.opened()[name]


def write_weights(
    folder: Path, state: Mapping[str, LazyTensor], stem: str = "model", limit: int = SHARD_BYTES
) -> None:
    """Write `{stem}.safetensors`, or shards of at most `limit` bytes with their index, in the given order.

    One tensor at a time is in memory. Raises OSError as the file system does.
    """
    shards: list[LazyStateDict] = [{}]
    room = limit
    for name, tensor in state.items():
        if tensor.size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.size
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shards[0])
        return
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        names |= dict.fromkeys(shard, file)
    total = sum(tensor.size for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def write_file(path: Path, state: Mapping[str, LazyTensor]) -> None:
    """One safetensors file, as its format says: the header's length, the header, the bytes.

    Wider types come first, so that every tensor is aligned; then names count, as in the library's own writer.
    """
    order = sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in order:
        if tensor.dtype not in _WRITTEN:
            raise InputError(f"cannot write {name}: {tensor.dtype} is none of {', '.join(FLOATS.values())}")
        end = start + tensor.size
        header[name] = {
            "dtype": _WRITTEN[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % 64)  # so that mapped bytes begin where a line of the cache does
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in order:
            value = tensor.read().detach().cpu().contiguous()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"{name} is {value.shape} {value.dtype}, not {tensor.shape} {tensor.dtype}")
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
