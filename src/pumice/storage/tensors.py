"""Read and write tensors in safetensors and `.bin` files, one tensor at a time.

Files are mapped into memory: a tensor that keeps its type is not copied. A `.bin` is a pickle; torch's
restricted reader (`weights_only`) reads its tensors and runs no code.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pumice.errors import InputError, WorkError
from pumice.kernels.packed import BlockFormat, PackedMatrix
from pumice.storage.json_file import Keys, write_json
from pumice.storage.outline import ValuesNotHere, is_outline, read_outline

SHARD_BYTES = 5 * 10**9
MAPPED_BYTES = 2**28  # of a file whose tensors are read once each: it is closed after so many
# The types that we write and compute in, with their names in a safetensors header.
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# The types that can be read.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_WRITTEN = FLOATS | {torch.uint8: "U8"}
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Blocks:
    """A matrix stored in quantised blocks. fetch: reads it; the tensor's floats are restored from it."""

    kind: BlockFormat
    fetch: Callable[[], PackedMatrix]
    mapped: bool = False  # whether fetching maps a file, without work or memory


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read only when it is needed.

    loader: reads it in the type that it is given. origin: key and file, for messages. blocks: only of a
    matrix that is stored in few bits, or will be; an operation that changes its values drops them. stored_as,
    stored_bytes: ggml's name of the type and the size in the file, of a tensor in a GGUF file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    loader: Callable[[torch.dtype], Tensor]
    origin: str = ""
    blocks: Blocks | None = None
    stored_as: str = ""
    stored_bytes: int = 0

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor in `dtype`, or in the type that it is stored in."""
        return self.loader(dtype or self.dtype)

    def map(self, function: Callable[[Tensor], Tensor], shape: Iterable[int] | None = None) -> LazyTensor:
        """Apply `function` to the stored tensor whenever it is read.

        shape: the shape of the result, if it is another one.
        """
        return LazyTensor(
            self.shape if shape is None else tuple(shape),
            self.dtype,
            lambda dtype: function(self.read()).to(dtype),
            self.origin,
        )

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """Return this tensor as if it were stored in `dtype`."""
        return LazyTensor(self.shape, dtype, self.loader, self.origin)

    @property
    def size(self) -> int:
        """The size in bytes, in the type that it is stored in."""
        return math.prod(self.shape) * self.dtype.itemsize


LazyStateDict = dict[str, LazyTensor]


def as_lazy(tensor: Tensor, origin: str = "") -> LazyTensor:
    """Return a tensor in memory as a LazyTensor."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.to, origin)


def is_same(first: LazyTensor, second: LazyTensor) -> bool:
    """Return whether two tensors hold the same values. Not-a-number is the same as not-a-number only."""
    if first.shape != second.shape:
        return False
    common = first.dtype if first.dtype == second.dtype else torch.float32
    one, other = first.read(common), second.read(common)
    return torch.equal(one, other) or torch.allclose(
        one.float(), other.float(), rtol=0, atol=0, equal_nan=True
    )


def check_same(first: LazyTensor, second: LazyTensor, label: str, hint: str = "") -> None:
    """Raise InputError unless two copies of one tensor are equal. hint: another remedy than removing one.

    Copies in an outline are compared once they are fetched.
    """
    try:
        same = is_same(first, second)
    except ValuesNotHere:
        return
    if not same:
        raise InputError(
            f"{label}: {first.origin} and {second.origin} should be two copies of one tensor, but differ; "
            f"remove the wrong one{f' ({hint})' if hint else ''}"
        )


def find_weights(folder: Path, stem: str = "") -> list[Path]:
    """Return the files of a folder's weights, or the indices of their shards; first the one to read.

    stem: how the file names begin; `model`, then `pytorch_model`, by default.
    """
    # Safetensors come first, because they are read without unpickling. An index comes before a single file of
    # the same kind, which may be a shard that was left over.
    endings = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
    stems = (stem,) if stem else ("model", "pytorch_model")
    files = (folder / f"{name}{ending}" for name in stems for ending in endings)
    return [path for path in files if path.is_file()]


def open_weights(folder: Path, stem: str = "") -> LazyStateDict:
    """Return all tensors of a folder's weights.

    Raises InputError if there are none, a file is damaged, or the folder holds two versions that differ.
    """
    weight_files = find_weights(folder, stem)
    if not weight_files:
        loose = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        hint = f"; {loose[0]} is there, but no index that names it" if loose else ""
        raise InputError(f"{folder} holds no weights: neither safetensors nor .bin{hint}")
    tensors = _open_all(weight_files[0])
    for path in weight_files[1:]:
        _check_other(tensors, weight_files[0], path)
    return tensors


def _open_all(path: Path) -> LazyStateDict:
    return _open_index(path) if path.suffix == ".json" else open_file(path)


def _check_other(tensors: LazyStateDict, chosen: Path, other: Path) -> None:
    """Raise InputError if another file of a folder's weights holds other values than the chosen one."""
    try:
        others = _open_all(other)
    except (InputError, ValuesNotHere):
        return  # what is left of a download that was not needed, or has no outline and is not needed either
    for name in tensors.keys() & others.keys():
        # Weights that were trained differ everywhere, so the beginning of each tensor is enough; the types
        # may differ.
        try:
            first, second = (
                state[name].read().flatten()[:4096].float().nan_to_num() for state in (tensors, others)
            )
        except ValuesNotHere:
            return  # as in `check_same`
        if tensors[name].shape != others[name].shape or not torch.allclose(
            first, second, rtol=1e-2, atol=1e-6
        ):
            raise InputError(
                f"{chosen} and {other.name} hold different values of {name}; remove the wrong weights"
            )


def open_file(path: Path) -> LazyStateDict:
    """Return the tensors of one file, in its order."""
    stored_as: type[_File] = _Safetensors if path.suffix == ".safetensors" else _Bin
    file = (_Outline if is_outline(path) else stored_as)(path)
    return {name: file.lazy_tensor(name) for name in file.names()}


def _open_index(index: Path) -> LazyStateDict:
    """Return the tensors that an index assigns to shards, shard by shard."""
    # 1. Group the names by shard. A shard is a plain file name, so that an index cannot reach other folders.
    shard_names: dict[str, list[str]] = {}
    for name, shard in Keys.of(index).object("weight_map").values.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index} puts {name} into {shard!r}, which is no file name")
        shard_names.setdefault(shard, []).append(name)
    if not shard_names:
        raise InputError(f"{index} names no tensors; fetch it again")
    # 2. Open each shard. Index and shard must agree exactly: otherwise files of two models are mixed.
    tensors: LazyStateDict = {}
    for shard, names in sorted(shard_names.items()):
        path = index.parent / shard
        if not path.is_file():
            raise InputError(f"{index} names {shard}, which is not beside it; fetch that file as well")
        shard_tensors = open_file(path)
        if missing := [name for name in names if name not in shard_tensors]:
            raise InputError(f"{index} says that {missing[0]} is in {shard}, which does not hold it")
        if extra := [name for name in shard_tensors if name not in names]:
            raise InputError(f"{path} holds {extra[0]}, which {index.name} does not name")
        tensors |= shard_tensors
    return tensors


class _File:
    """One file of tensors. It stays open until a tensor of another file is read."""

    # Only one file is open at a time, so that only its mapped pages count as this process's memory.
    _last: _File | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._bytes_read = 0  # since it was opened
        self.is_mapped = True

    def handle(self) -> Any:
        """Return the open file; open it first if another one was read last."""
        if self._handle is None:
            if _File._last is not None:
                _File._last._handle = None
            self._handle, _File._last = self._open(), self
            self._bytes_read = 0
        return self._handle

    def lazy_tensor(self, name: str) -> LazyTensor:
        shape, stored_dtype = self._shape_and_dtype(name)

        def load(dtype: torch.dtype) -> Tensor:
            tensor = self._read(name)
            self._bytes_read += tensor.nbytes
            return tensor.to(dtype)

        return LazyTensor(shape, stored_dtype, load, f"{name} in {self.path.name}")

    def names(self) -> list[str]:
        return list(self.handle().keys())

    def _open(self) -> Any:
        raise NotImplementedError

    def _shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        raise NotImplementedError

    def _read(self, name: str) -> Tensor:
        raise NotImplementedError

    def _unreadable(self, error: Exception, problem: str = "") -> InputError:
        """Say why the file cannot be read. problem: in words, if `error` does not say."""
        try:
            with self.path.open("rb") as file:
                start = file.read(len(_LFS))
        except OSError as os_error:
            return InputError(f"{self.path} cannot be read: {os_error.strerror}")
        if start == _LFS:
            return InputError(
                f"{self.path} is a pointer of Git LFS, not the weights; run `git lfs pull` there"
            )
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return InputError(f"{self.path} is {problem or f'damaged or cut short ({reason})'}; fetch it again")


def _dtype(kind: str, name: str, path: Path) -> torch.dtype:
    """Return torch's type of a safetensors type. Raises InputError, which names the tensor, on others."""
    if (dtype := _DTYPES.get(kind)) is None:
        raise InputError(f"{path}: {name} is stored as {kind}, which cannot be read")
    return dtype


def close_last_file(pages: int = 0) -> None:
    """Close the file that was read last: its pages count as this process's memory while it is open.

    pages: keep it open until so many bytes of it have been read, because opening a `.bin` takes time, and
    for ever if it cannot be mapped: it would be read whole again.
    """
    last = _File._last
    if last is not None and last._bytes_read >= pages and (last.is_mapped or not pages):
        _File._last = last._handle = None


class _Safetensors(_File):
    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._unreadable(error) from error

    def _shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        # A slice knows type and shape from the header; no values are read.
        header = self.handle().get_slice(name)
        return tuple(header.get_shape()), _dtype(header.get_dtype(), name, self.path)

    def _read(self, name: str) -> Tensor:
        try:
            return self.handle().get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(error) from error


class _Bin(_File):
    def _open(self) -> Any:
        try:
            with warnings.catch_warnings():
                # torch warns about how the pickle was written; the user cannot change that.
                warnings.simplefilter("ignore", UserWarning)
                # Files written before PyTorch 1.6 are no zips, and cannot be mapped.
                self.is_mapped = zipfile.is_zipfile(self.path)
                state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.is_mapped)
        except pickle.UnpicklingError as error:
            problem = "refused: it is damaged, or holds more than tensors, and code in it is never run"
            raise self._unreadable(error, problem) from error
        except MemoryError:
            raise
        except Exception as error:  # torch raises errors of many kinds for what is no pickle
            raise self._unreadable(error) from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise InputError(f"{self.path} does not hold named tensors, so it is no checkpoint")
        return state

    def _shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        tensor = self.handle()[name]
        return tuple(tensor.shape), tensor.dtype

    def _read(self, name: str) -> Tensor:
        return self.handle()[name]


class _Outline(_File):
    """Names, types and shapes of a file on the hub."""

    def _open(self) -> Any:
        return read_outline(self.path)

    def _shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        kind, shape = self.handle()[name]
        return tuple(shape), _dtype(kind, name, self.path)

    def _read(self, name: str) -> Tensor:
        raise ValuesNotHere(f"{name} in {self.path.name}")


def write_weights(
    folder: Path, state: Mapping[str, LazyTensor], stem: str = "model", limit: int = SHARD_BYTES
) -> None:
    """Write `{stem}.safetensors`, or shards of at most `limit` bytes with their index, in the given order.

    Only one tensor at a time is in memory. Raises OSError if the file system does.
    """
    # 1. Fill one shard after another. A tensor larger than the limit gets a shard of its own.
    shards: list[LazyStateDict] = [{}]
    room = limit
    for name, tensor in state.items():
        if tensor.size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.size
    # 2. One shard needs no index.
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shards[0])
        return
    # 3. Write the shards under Hugging Face's names, and an index that says which tensor is in which file.
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.size for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def check_written(name: str, tensor: LazyTensor, value: Tensor, remedy: str) -> None:
    """Raise unless `value`, which will be written for `tensor`, is finite.

    Raises InputError, which names the remedy, if the type is too narrow; WorkError if the tensor is spoiled.
    """
    # A sum is finite only if all its terms are, and costs less than a comparison of each.
    if bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all()):
        return
    label = tensor.origin or name
    if bool(tensor.read(torch.float32).isfinite().all()):
        largest = torch.finfo(value.dtype).max
        raise InputError(f"{label} has values beyond the {largest:g} of {FLOATS[value.dtype]}; {remedy}")
    raise WorkError(f"{label} holds nan or inf; get the model again")


def write_file(path: Path, state: Mapping[str, LazyTensor]) -> None:
    """Write one safetensors file: the length of the header, the header in JSON, the bytes of the tensors.

    Raises InputError if a tensor is none of FLOATS or too wide for its type, WorkError if it holds nan.
    """
    # 1. Describe the tensors. Wider types come first, so that every tensor is aligned in the file; tensors of
    # one type are in the order of their names, as the safetensors library writes them.
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
    # 2. The header is filled up with blanks to a multiple of 8 bytes, which aligns the first tensor.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % 64)  # so that mapped bytes begin where a line of the cache does
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in order:
            value = tensor.read().detach().cpu().contiguous()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(f"{name} is {value.shape} {value.dtype}, not {tensor.shape} {tensor.dtype}")
            check_written(name, tensor, value, "choose a wider type")
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            del value
            close_last_file(MAPPED_BYTES)
