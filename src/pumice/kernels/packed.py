"""A matrix in blocks of few bits: its layout in memory and in files, to and from floats and GGUF's blocks.

The layout is that of `packed.h`. What is here runs everywhere and says what the compiled code must give.

Shapes: N outputs (rows), K inputs, G = K / 32 groups, T = N / 16 tiles, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

GROUP, SUPER, TILE = 32, 8, 16  # weights of a group, groups of a block of Q4_K, rows of a tile
LAYOUT = 1  # of a stored matrix; another number when packed.h changes
_PIECE = 1 << 21  # weights that are turned into floats at a time


class BlockFormat(Enum):
    """GGUF's block formats: (number in `packed.h`, ggml's number, weights of a block, its bytes)."""

    Q8_0 = (0, 8, 32, 34)
    Q4_0 = (1, 2, 32, 18)
    Q4_1 = (2, 3, 32, 20)
    Q4_K = (3, 12, 256, 144)

    @property
    def code(self) -> int:
        return self.value[0]

    @property
    def ggml(self) -> int:
        return self.value[1]

    @property
    def block(self) -> int:
        """Weights of a row that are stored together: rows are whole blocks."""
        return self.value[2]

    @property
    def block_bytes(self) -> int:
        return self.value[3]


def size(kind: BlockFormat, outputs: int, inputs: int) -> int:
    """Bytes of a packed matrix."""
    tiles, groups = -(-outputs // TILE), inputs // GROUP
    scales = {BlockFormat.Q4_1: 4, BlockFormat.Q4_K: 2}.get(kind, 2) * TILE * groups
    if kind is BlockFormat.Q4_K:
        scales += 4 * TILE * groups // SUPER
    return tiles * (_number_bytes(kind, inputs) + -(-scales // 64) * 64)


@dataclass(frozen=True)
class Parts:
    """What blocks hold, row by row, in no layout: numbers (N, G, 32) from 0 to 15, or 255 in Q8_0.

    halves: fp16 (N, G, 1 or 2), scales and offsets; in Q4_K (N, G / 8, 2). factors: Q4_K's bytes (N, G, 2).
    """

    numbers: Tensor
    halves: Tensor
    factors: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Parts:
        factors = None if self.factors is None else change(self.factors)
        return Parts(change(self.numbers), change(self.halves), factors)


def joined(pieces: Sequence[Parts]) -> Parts:
    """The parts of more rows."""
    factors = [piece.factors for piece in pieces if piece.factors is not None]
    return Parts(
        torch.cat([piece.numbers for piece in pieces]),
        torch.cat([piece.halves for piece in pieces]),
        torch.cat(factors) if factors else None,
    )


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (outputs, inputs). data: uint8, `size` of them."""

    kind: BlockFormat
    outputs: int
    inputs: int
    data: Tensor

    def restored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights (N, K) as they act."""
        out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.data.device)
        for first, parts in self.parts():
            rows = out[first : first + len(parts.numbers)]
            rows.copy_(values(self.kind, parts).flatten(1)[: len(rows)])
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows (..., K) in fp32, as an embedding is read."""
        flat = ids.flatten()
        tiles = self.data.view(-1, len(self.data) // max(1, -(-self.outputs // TILE)))
        parts = _parts(self.kind, self.inputs, tiles[flat // TILE])
        each = torch.arange(len(flat), device=flat.device) * TILE + flat % TILE
        return values(self.kind, parts.each(lambda part: part[each])).view(*ids.shape, self.inputs)

    def parts(self) -> Iterator[tuple[int, Parts]]:
        """(first row, what the blocks of some tiles hold), piece by piece; rows that fill a tile included."""
        tiles = self.data.view(-1, len(self.data) // -(-self.outputs // TILE))
        many = max(1, _PIECE // (TILE * self.inputs))
        for first in range(0, len(tiles), many):
            yield first * TILE, _parts(self.kind, self.inputs, tiles[first : first + many])

    def blocks(self) -> Tensor:
        """The matrix as GGUF has it: bytes (N, K / block, block_bytes)."""
        count = self.inputs // self.kind.block
        out = torch.empty(self.outputs, count, self.kind.block_bytes, dtype=torch.uint8)
        for first, parts in self.parts():
            rows = out[first : first + len(parts.numbers)]
            rows.copy_(_to_blocks(self.kind, parts)[: len(rows)])
        return out


def values(kind: BlockFormat, parts: Parts) -> Tensor:
    """Parts of n rows -> weights (n, G, 32) in fp32."""
    numbers, halves = parts.numbers.float(), parts.halves.float()
    if kind is BlockFormat.Q8_0:
        return (numbers - 128) * halves
    if kind is BlockFormat.Q4_0:
        return (numbers - 8) * halves
    if parts.factors is None:
        return numbers * halves[..., :1] + halves[..., 1:]
    scales = halves.repeat_interleave(SUPER, 1) * parts.factors.float()
    return numbers * scales[..., :1] - scales[..., 1:]


def pack(kind: BlockFormat, parts: Parts) -> PackedMatrix:
    """Parts of N rows as a packed matrix."""
    outputs, groups, _ = parts.numbers.shape
    inputs = groups * GROUP
    data = torch.zeros(size(kind, outputs, inputs), dtype=torch.uint8)
    tiles = data.view(-1, len(data) // -(-outputs // TILE))
    if spare := -outputs % TILE:  # rows of zeros
        parts = parts.each(lambda part: _longer(part, spare))
    numbers = parts.numbers
    if kind is not BlockFormat.Q8_0:
        numbers = numbers[..., : GROUP // 2] | numbers[..., GROUP // 2 :] << 4
    at = _number_bytes(kind, inputs)
    rows = numbers.view(len(tiles), TILE, groups, -1, 4)
    tiles[:, :at] = rows.permute(0, 2, 3, 1, 4).flatten(1)
    if parts.factors is not None:
        width = 2 * TILE * groups
        factors = parts.factors.view(len(tiles), TILE, groups, 2).permute(0, 2, 3, 1)
        tiles[:, at : at + width] = factors.flatten(1)
        at += width
    halves = parts.halves.view(len(tiles), TILE, *parts.halves.shape[1:]).permute(0, 2, 3, 1)
    halves = halves.flatten(1).contiguous().view(torch.uint8)
    tiles[:, at : at + halves.shape[1]] = halves
    return PackedMatrix(kind, outputs, inputs, data)


def from_blocks(kind: BlockFormat, blocks: Tensor) -> PackedMatrix:
    """GGUF's blocks (N, K / block, block_bytes) as a packed matrix; nothing is lost."""
    pieces = [_from_blocks(kind, piece) for piece in blocks.split(max(1, _PIECE // (blocks[0].numel() + 1)))]
    return pack(kind, joined(pieces))


def _number_bytes(kind: BlockFormat, inputs: int) -> int:
    return TILE * inputs if kind is BlockFormat.Q8_0 else TILE * inputs // 2


def _longer(tensor: Tensor, spare: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(spare, *tensor.shape[1:])))


def _parts(kind: BlockFormat, inputs: int, tiles: Tensor) -> Parts:
    """Tiles (t, bytes) -> parts of their 16 t rows."""
    groups, at = inputs // GROUP, _number_bytes(kind, inputs)
    numbers = tiles[:, :at].reshape(len(tiles), groups, -1, TILE, 4)
    if kind is not BlockFormat.Q8_0:
        numbers = torch.cat((numbers & 15, numbers >> 4), 2)
    numbers = numbers.permute(0, 3, 1, 2, 4).reshape(-1, groups, GROUP)
    factors = None
    if kind is BlockFormat.Q4_K:
        width = 2 * TILE * groups
        factors = tiles[:, at : at + width].reshape(len(tiles), groups, 2, TILE)
        factors = factors.permute(0, 3, 1, 2).reshape(-1, groups, 2)
        at += width
    each = 2 if kind in (BlockFormat.Q4_1, BlockFormat.Q4_K) else 1
    count = groups // SUPER if kind is BlockFormat.Q4_K else groups
    halves = tiles[:, at : at + 2 * TILE * each * count].contiguous().view(torch.float16)
    halves = halves.view(len(tiles), count, each, TILE).permute(0, 3, 1, 2).reshape(-1, count, each)
    return Parts(numbers, halves, factors)


def _from_blocks(kind: BlockFormat, blocks: Tensor) -> Parts:
    """The formats are those of ggml's `ggml-common.h`."""
    count = 2 if kind in (BlockFormat.Q8_0, BlockFormat.Q4_0) else 4
    halves = blocks[..., :count].contiguous().view(torch.float16)
    if kind is BlockFormat.Q8_0:
        return Parts(blocks[..., 2:] ^ 128, halves)
    if kind is not BlockFormat.Q4_K:
        both = blocks[..., count:]
        return Parts(torch.cat((both & 15, both >> 4), -1), halves)
    rows = len(blocks)
    a, b, c = blocks[..., 4:16].split(4, -1)  # scales, offsets, and the lower halves of the last four of both
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), -1)
    offsets = torch.cat((b & 63, c >> 4 | b >> 6 << 4), -1)
    both = blocks[..., 16:].unflatten(-1, (4, GROUP))  # the lower halves are a group, the upper ones the next
    numbers = torch.stack((both & 15, both >> 4), -2).reshape(rows, -1, GROUP)
    return Parts(numbers, halves, torch.stack((scales, offsets), -1).reshape(rows, -1, 2))


def _to_blocks(kind: BlockFormat, parts: Parts) -> Tensor:
    """`_from_blocks` the other way round."""
    halves = parts.halves.contiguous().view(torch.uint8)
    if kind is BlockFormat.Q8_0:
        return torch.cat((halves, parts.numbers ^ 128), -1)
    if parts.factors is None:
        half = GROUP // 2
        return torch.cat((halves, parts.numbers[..., :half] | parts.numbers[..., half:] << 4), -1)
    rows = len(parts.numbers)
    scales, offsets = parts.factors.view(rows, -1, SUPER, 2).unbind(-1)
    a, b = (x[..., :4] | x[..., 4:] >> 4 << 6 for x in (scales, offsets))
    c = scales[..., 4:] & 15 | (offsets[..., 4:] & 15) << 4
    numbers = parts.numbers.view(rows, -1, 4, 2, GROUP)
    both = (numbers[..., 0, :] | numbers[..., 1, :] << 4).flatten(-2)
    return torch.cat((halves, a, b, c, both), -1)
