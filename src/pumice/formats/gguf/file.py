"""Read a GGUF file: its metadata, and its tensors, which are dequantised one at a time.

The layout is in ggml's docs/gguf.md (versions 2 and 3, little-endian). Rare block formats (q5, k-quants, ...)
need the `gguf` package, which is imported only then: its reader takes seconds to open a file with a
vocabulary, this one takes a twentieth of a second.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumice.errors import InputError
from pumice.formats.gguf.metadata import check_metadata
from pumice.storage.outline import RemoteFile, ValuesNotHere, remote_file

# Type numbers of metadata values: of scalars with their struct codes, of strings and arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml's tensor types that are not quantised; numbers of positions may be whole numbers.
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 26: torch.int32, 27: torch.int64}
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_LARGEST_HEADER = 1 << 27  # bytes; real ones have up to some 30 MB. A list takes 16 times its bytes in memory
# Bytes of a file on the hub that are fetched for its header, first; and of a tensor that is read there.
_HEADER_PARTS = (1 << 20, 1 << 23, _LARGEST_HEADER)
_SMALL_TENSOR = 1 << 16
_CHUNK = 1 << 13  # blocks dequantised at a time: 1 MB of values, which stays in the processor's cache


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape in torch's order, ggml's number of its type, and its byte offset in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        """Its bytes in the file; 0 for an unknown type."""
        values, size = _block_size(self.kind)
        return prod(self.shape) // values * size


class GgufFile:
    """A GGUF file: `metadata` (key -> Python value), `infos` (name -> TensorInfo), `tensor(name)`.

    Raises InputError if the file is missing, is not GGUF, ends too early, or cuts a block of a row.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._remote = remote_file(self.path)
        try:
            if self._remote is not None:
                size = self._remote.size
                self._fetch_header(self._remote)
            else:
                with self.path.open("rb") as file:
                    # Only the header is mapped: reading tensors is far faster than faulting them in.
                    size = os.fstat(file.fileno()).st_size
                    if size == 0:
                        raise self._no_gguf()
                    header = min(size, _LARGEST_HEADER)
                    with mmap.mmap(file.fileno(), header, access=mmap.ACCESS_READ) as mapped:
                        self.metadata, self.infos = self._header(mapped)
            complete = all(info.offset + info.size <= size for info in self.infos.values())
        except OSError as error:
            raise InputError(f"cannot read the GGUF file {self.path}: {error.strerror}") from error
        except (struct.error, OverflowError, UnicodeDecodeError) as error:
            raise self._damaged() from error
        if not complete:
            raise self._damaged()
        for name, info in self.infos.items():
            if info.shape[-1] % (values := _block_size(info.kind)[0]):
                raise InputError(
                    f"{self.path}: {name} has rows of {info.shape[-1]} values, not whole blocks of {values}; "
                    "convert the model again"
                )

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read the tensor `name` in `dtype`. Quantised values are rounded once, from float32."""
        info = self.infos[name]
        if info.kind in PLAIN:
            return self._bytes(info).view(PLAIN[info.kind]).reshape(info.shape).to(dtype)
        # A quantised row is a sequence of blocks, each with its own scale.
        decode = _decoder(info.kind, f"{self.path}: {name}")
        values, size = _block_size(info.kind)
        blocks = self._bytes(info).view(-1, size)
        out = torch.empty(blocks.shape[0], values, dtype=dtype)
        for start in range(0, blocks.shape[0], _CHUNK):
            out[start : start + _CHUNK] = decode(blocks[start : start + _CHUNK])
        return out.view(info.shape)

    def blocks(self, name: str) -> Tensor:
        """The matrix `name` as it is stored, in blocks: bytes (rows, blocks of a row, bytes of a block)."""
        info = self.infos[name]
        return self._bytes(info).view(info.shape[0], -1, _block_size(info.kind)[1])

    def _bytes(self, info: TensorInfo) -> Tensor:
        if self._remote is not None:
            if info.size > _SMALL_TENSOR:
                raise ValuesNotHere(self.path.name)
            return torch.frombuffer(bytearray(self._remote.read(info.offset, info.size)), dtype=torch.uint8)
        raw = np.fromfile(self.path, dtype=np.uint8, count=info.size, offset=info.offset)
        if len(raw) != info.size:
            raise self._damaged()
        return torch.from_numpy(raw)

    def _damaged(self) -> InputError:
        return InputError(f"the GGUF file {self.path} is damaged or cut short; fetch it again")

    def _no_gguf(self) -> InputError:
        return InputError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'")

    def _fetch_header(self, remote: RemoteFile) -> None:
        """Fetch as much of the file's beginning as its header takes."""
        for count in _HEADER_PARTS:
            data = remote.read(0, count)
            try:
                self.metadata, self.infos = self._header(data)
                return
            except (struct.error, UnicodeDecodeError):  # it is longer, or damaged
                if len(data) < count or count == _HEADER_PARTS[-1]:
                    raise

    def _header(self, mapped: mmap.mmap | bytes) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if mapped[:4] != b"GGUF":
            raise self._no_gguf()
        cursor = _Cursor(mapped, 4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise InputError(
                f"{self.path} is GGUF version {version}, and only 2 and 3 (little-endian) can be read; "
                "convert the model again, or fetch a newer file"
            )
        tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {}
        for _ in range(key_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        check_metadata(metadata, str(self.path))
        # ggml lists the fastest-varying dimension first, torch lists it last.
        entries = []
        for _ in range(tensor_count):
            name = cursor.string()
            dimensions = cursor.scalar("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise struct.error(f"{name} has {dimensions} dimensions")
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
            entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        counts = Counter(name for name, *_ in entries)
        if twice := next((name for name, count in counts.items() if count > 1), None):
            raise InputError(f"{self.path} holds two tensors of the name {twice}; convert it again")
        # Offsets count from the end of the header, rounded up to the alignment.
        align = metadata.get("general.alignment", 32)
        start = -(-cursor.position // align) * align
        return metadata, {
            name: TensorInfo(shape, kind, start + offset) for name, shape, kind, offset in entries
        }


class _Cursor:
    """Read little-endian values one after another."""

    def __init__(self, buffer: mmap.mmap | bytes, position: int) -> None:
        self.buffer, self.position = buffer, position

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.buffer, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # Local variables: a vocabulary has hundreds of thousands of strings.
        buffer, position, unpack = self.buffer, self.position, struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            (length,) = unpack(buffer, position)
            position += 8
            texts.append(buffer[position : position + length].decode())
            position += length
        if position > len(buffer):
            raise struct.error("a text is cut short")
        self.position = position
        return texts

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self._code(kind))
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner == _STRING:
            return self.strings(count)
        if inner == _ARRAY:
            raise struct.error("a list of lists, which no key has")
        layout = f"<{count}{self._code(inner)}"
        values = struct.unpack_from(layout, self.buffer, self.position)
        self.position += struct.calcsize(layout)
        return list(values)

    @staticmethod
    def _code(kind: int) -> str:
        if kind not in _SCALARS:
            raise struct.error(f"unknown value type {kind}")
        return _SCALARS[kind]


def _half(column: Tensor) -> Tensor:
    """Return (n, 2) bytes of half precision as (n, 1) float32."""
    return column.contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Return (n, 16) bytes as (n, 32) float32 in 0..15: first all low halves, then all high halves."""
    out = torch.empty(packed.shape[0], 32, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=out[:, :16])
    torch.bitwise_right_shift(packed, 4, out=out[:, 16:])
    return out.float()


# Each takes blocks of bytes (n, size) and returns (n, 32) float32; ggml's `ggml-common.h` has the layouts.
def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks[:, :2])).add_(_half(blocks[:, 2:4]))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks[:, :2]))


_Decode = Callable[[Tensor], Tensor]
# ggml's type -> (values per block, bytes per block, decoder).
_BLOCKS: dict[int, tuple[int, int, _Decode]] = {2: (32, 18, _q4_0), 3: (32, 20, _q4_1), 8: (32, 34, _q8_0)}
# Those that the gguf package decodes: name, values per block, bytes per block.
_RARE = {
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
}  # fmt: skip
_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 26: "I32", 27: "I64", 30: "BF16"}


def kind_name(kind: int) -> str:
    """Return ggml's name of a tensor type, its number if it is unknown here."""
    return _NAMES.get(kind) or (_RARE[kind][0] if kind in _RARE else f"type {kind}")


def _block_size(kind: int) -> tuple[int, int]:
    """Return the values and the bytes of one block of ggml's type; (1, 0) if it is unknown."""
    if kind in PLAIN:
        return 1, PLAIN[kind].itemsize
    if kind in _BLOCKS:
        return _BLOCKS[kind][:2]
    if kind in _RARE:
        return _RARE[kind][1:]
    from gguf import GGML_QUANT_SIZES

    sizes: dict[int, tuple[int, int]] = {int(other): size for other, size in GGML_QUANT_SIZES.items()}
    return sizes.get(kind, (1, 0))


def _decoder(kind: int, label: str) -> _Decode:
    """Return what decodes a type's blocks: (n, bytes) uint8 -> (n, values) float32."""
    if kind in _BLOCKS:
        return _BLOCKS[kind][2]
    from gguf import GGMLQuantizationType, quants

    # Some types are listed but cannot be dequantised: try one block.
    try:
        quant_type = GGMLQuantizationType(kind)
        quants.dequantize(np.zeros((1, _block_size(kind)[1]), np.uint8), quant_type)
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"{label} is stored in ggml type {kind}, which cannot be read; fetch the model in another type, "
            "such as Q4_K_M"
        ) from error
    return lambda blocks: torch.from_numpy(quants.dequantize(blocks.numpy(), quant_type))
