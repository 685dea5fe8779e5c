"""Packed (quantised) matrices: convert them to and from floats and GGUF's blocks, in PyTorch.

`packed.h` describes the layout in memory and in files. Compiled code reads and writes the same layout.

Shapes: N outputs (rows), K inputs, G = K / 32 groups, T = N / 16 tiles, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

GROUP, SUPER, TILE = 32, 8, 16  # weights of a group, groups of a block of Q4_K, rows of a tile
LAYOUT = 1  # version of the layout of stored matrices; increase it when packed.h changes
_CHUNK = 1 << 21  # weights that are converted at a time


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


def packed_size(kind: BlockFormat, outputs: int, inputs: int) -> int:
    """Return the bytes of a packed matrix (outputs, inputs)."""
    tiles, groups = -(-outputs // TILE), inputs // GROUP
    scales = (4 if kind is BlockFormat.Q4_1 else 2) * TILE * groups
    if kind is BlockFormat.Q4_K:
        scales += 4 * TILE * groups // SUPER
    return tiles * (_number_bytes(kind, inputs) + -(-scales // 64) * 64)


@dataclass(frozen=True)
class Parts:
    """The contents of blocks, row by row, before they are laid out in tiles.

    numbers: (N, G, 32) uint8, from 0 to 15, in Q8_0 to 255. halves: fp16 scales, and offsets if the format
    has them: (N, G, 1 or 2), in Q4_K (N, G / 8, 2). factors: of scales and offsets, (N, G, 2) uint8, only in
    Q4_K.
    """

    numbers: Tensor
    halves: Tensor
    factors: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Parts:
        """Apply a function to each tensor."""
        factors = None if self.factors is None else function(self.factors)
        return Parts(function(self.numbers), function(self.halves), factors)


def concatenate(chunks: Sequence[Parts]) -> Parts:
    """Return the rows of all chunks as one."""
    factors = [chunk.factors for chunk in chunks if chunk.factors is not None]
    return Parts(
        torch.cat([chunk.numbers for chunk in chunks]),
        torch.cat([chunk.halves for chunk in chunks]),
        torch.cat(factors) if factors else None,
    )


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (outputs, inputs) in the layout of `packed.h`. data: (packed_size,) uint8."""

    kind: BlockFormat
    outputs: int
    inputs: int
    data: Tensor

    def restored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights (N, K), as rounded by quantisation."""
        out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.data.device)
        for first, parts in self.parts():
            rows = out[first : first + len(parts.numbers)]
            rows.copy_(values(self.kind, parts).flatten(1)[: len(rows)])
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids (...) in fp32: (..., K), as an embedding does."""
        flat_ids = ids.flatten()
        tiles = self.data.view(-1, len(self.data) // max(1, -(-self.outputs // TILE)))
        # Unpack each id's tile, then take from these tiles the row of the id.
        parts = _unpack_tiles(self.kind, self.inputs, tiles[flat_ids // TILE])
        rows = torch.arange(len(flat_ids), device=ids.device) * TILE + flat_ids % TILE
        return values(self.kind, parts.map(lambda part: part[rows])).view(*ids.shape, self.inputs)

    def parts(self) -> Iterator[tuple[int, Parts]]:
        """Yield (index of the first row, parts of some tiles), with the rows that pad the last tile."""
        tiles = self.data.view(-1, len(self.data) // -(-self.outputs // TILE))
        chunk_tiles = max(1, _CHUNK // (TILE * self.inputs))
        for first in range(0, len(tiles), chunk_tiles):
            yield first * TILE, _unpack_tiles(self.kind, self.inputs, tiles[first : first + chunk_tiles])

    def blocks(self) -> Tensor:
        """Return the matrix in GGUF's layout: (N, K / block, block_bytes) uint8."""
        count = self.inputs // self.kind.block
        out = torch.empty(self.outputs, count, self.kind.block_bytes, dtype=torch.uint8)
        for first, parts in self.parts():
            rows = out[first : first + len(parts.numbers)]
            rows.copy_(_to_blocks(self.kind, parts)[: len(rows)])
        return out


def values(kind: BlockFormat, parts: Parts) -> Tensor:
    """Return the weights (N, G, 32) of parts, in fp32."""
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
    """Lay out the parts of all rows as a packed matrix."""
    outputs, groups, _ = parts.numbers.shape
    inputs = groups * GROUP
    data = torch.zeros(packed_size(kind, outputs, inputs), dtype=torch.uint8)
    tiles = data.view(-1, len(data) // -(-outputs // TILE))
    # 1. Fill the last tile with rows of zeros.
    if padding := -outputs % TILE:
        parts = parts.map(lambda part: _pad_rows(part, padding))
    # 2. Numbers come first. Two numbers of 4 bits share a byte.
    numbers = parts.numbers
    if kind is not BlockFormat.Q8_0:
        numbers = numbers[..., : GROUP // 2] | numbers[..., GROUP // 2 :] << 4
    offset = _number_bytes(kind, inputs)
    rows = numbers.view(len(tiles), TILE, groups, -1, 4)
    tiles[:, :offset] = rows.permute(0, 2, 3, 1, 4).flatten(1)
    # 3. Then Q4_K's factors, then scales and offsets.
    if parts.factors is not None:
        width = 2 * TILE * groups
        factors = parts.factors.view(len(tiles), TILE, groups, 2).permute(0, 2, 3, 1)
        tiles[:, offset : offset + width] = factors.flatten(1)
        offset += width
    halves = parts.halves.view(len(tiles), TILE, *parts.halves.shape[1:]).permute(0, 2, 3, 1)
    halves = halves.flatten(1).contiguous().view(torch.uint8)
    tiles[:, offset : offset + halves.shape[1]] = halves
    return PackedMatrix(kind, outputs, inputs, data)


def from_blocks(kind: BlockFormat, blocks: Tensor) -> PackedMatrix:
    """Convert GGUF's blocks (N, K / block, block_bytes) to a packed matrix, without loss."""
    chunk_rows = max(1, _CHUNK // (blocks[0].numel() + 1))
    return pack(kind, concatenate([_from_blocks(kind, rows) for rows in blocks.split(chunk_rows)]))


def _number_bytes(kind: BlockFormat, inputs: int) -> int:
    """Return the bytes that a tile's numbers take."""
    return TILE * inputs if kind is BlockFormat.Q8_0 else TILE * inputs // 2


def _pad_rows(tensor: Tensor, count: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(count, *tensor.shape[1:])))


def _unpack_tiles(kind: BlockFormat, inputs: int, tiles: Tensor) -> Parts:
    """Return the parts of the rows of some tiles (t, bytes): the reverse of `pack`, for 16 t rows."""
    groups, offset = inputs // GROUP, _number_bytes(kind, inputs)
    numbers = tiles[:, :offset].reshape(len(tiles), groups, -1, TILE, 4)
    if kind is not BlockFormat.Q8_0:
        numbers = torch.cat((numbers & 15, numbers >> 4), 2)
    numbers = numbers.permute(0, 3, 1, 2, 4).reshape(-1, groups, GROUP)
    factors = None
    if kind is BlockFormat.Q4_K:
        width = 2 * TILE * groups
        factors = tiles[:, offset : offset + width].reshape(len(tiles), groups, 2, TILE)
        factors = factors.permute(0, 3, 1, 2).reshape(-1, groups, 2)
        offset += width
    per_block = 2 if kind in (BlockFormat.Q4_1, BlockFormat.Q4_K) else 1  # a scale, and an offset
    blocks = groups // SUPER if kind is BlockFormat.Q4_K else groups
    halves = tiles[:, offset : offset + 2 * TILE * per_block * blocks].contiguous().view(torch.float16)
    halves = halves.view(len(tiles), blocks, per_block, TILE).permute(0, 3, 1, 2)
    halves = halves.reshape(-1, blocks, per_block)
    return Parts(numbers, halves, factors)


def _from_blocks(kind: BlockFormat, blocks: Tensor) -> Parts:
    """Return the parts of GGUF's blocks (n, K / block, block_bytes), as ggml's `ggml-common.h` has them."""
    halves_end = 2 if kind in (BlockFormat.Q8_0, BlockFormat.Q4_0) else 4
    halves = blocks[..., :halves_end].contiguous().view(torch.float16)
    if kind is BlockFormat.Q8_0:
        return Parts(blocks[..., 2:] ^ 128, halves)
    if kind is not BlockFormat.Q4_K:
        pairs = blocks[..., halves_end:]
        return Parts(torch.cat((pairs & 15, pairs >> 4), -1), halves)
    rows = len(blocks)
    # Factors have 6 bits. a and b hold those of the first four groups. c holds the lower 4 bits of the other
    # four, whose upper 2 bits are in a and b.
    a, b, c = blocks[..., 4:16].split(4, -1)
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), -1)
    offsets = torch.cat((b & 63, c >> 4 | b >> 6 << 4), -1)
    pairs = blocks[..., 16:].unflatten(-1, (4, GROUP))  # the lower 4 bits are a group, the upper 4 the next
    numbers = torch.stack((pairs & 15, pairs >> 4), -2).reshape(rows, -1, GROUP)
    return Parts(numbers, halves, torch.stack((scales, offsets), -1).reshape(rows, -1, 2))


def _to_blocks(kind: BlockFormat, parts: Parts) -> Tensor:
    """Return GGUF's blocks of parts: the reverse of `_from_blocks`."""
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
    pairs = (numbers[..., 0, :] | numbers[..., 1, :] << 4).flatten(-2)
    return torch.cat((halves, a, b, c, pairs), -1)
