"""The KV cache keeps the keys and values of earlier tokens, so that a new token costs the work of one token.

It is made of blocks of cells, a cell for each token. A sequence has a table, which names its blocks in order,
so sequences that begin alike share blocks (vLLM, arXiv 2309.06180). `pumice.engine.cache` decides which
sequence holds which blocks. The new tokens of many sequences pass the decoder end to end, as one row: some
sequences bring one token (decode), others many (prefill).

Shapes: L layers, K key/value heads, C cells, d head dimension; B = 1, T new tokens of all sequences.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.kernels.attention import attend as attend_in_c
from pumice.kernels.attention import can_attend
from pumice.model.layers import Attend, causal_mask, sdpa

BLOCK = 64  # tokens of a block


class Segment(NamedTuple):
    """One sequence's part of a step: `new` tokens after `past` earlier ones, in the blocks of its table."""

    table: Sequence[int]
    past: int
    new: int


class KVCache:
    """Keys and values (L, K, C, d) of up to `capacity` tokens. Only cells that were written are read.

    The capacity is made of whole blocks; `blocks` is their number.
    """

    def __init__(
        self,
        config: DecoderConfig,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        block: int = BLOCK,
    ) -> None:
        self.block, self.blocks = block, -(-capacity // block)
        self.capacity = self.blocks * block
        shape = (config.depth, config.kv_heads, self.capacity, config.head_dim)
        # Not set to zero: on a CPU, the system provides memory only when it is first written.
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.config = config

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Return the size of one cell in bytes, over all layers."""
        return 2 * config.depth * config.kv_heads * config.head_dim * dtype.itemsize

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` cells of block `source` to block `target`."""
        start, end = source * self.block, target * self.block
        for layer in self._layers:
            for tensor in layer:
                tensor[:, end : end + tokens] = tensor[:, start : start + tokens]

    def positions(self, segments: Sequence[Segment]) -> Tensor:
        """Return the position of each new token in its sequence: (1, T)."""
        positions = [n for _, past, new in segments for n in range(past, past + new)]
        return torch.tensor([positions], device=self.keys.device)

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise ValueError unless the table of each segment has a block of the cache for all its tokens."""
        for table, past, new in segments:
            if past < 0 or new < 1 or past + new > len(table) * self.block:
                raise ValueError(
                    f"{past} + {new} tokens do not fit in {len(table)} blocks of {self.block} cells"
                )
            if min(table) < 0 or max(table) >= self.blocks:
                raise ValueError(f"blocks {list(table)} are not all in a cache of {self.blocks} blocks")

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """Return the attention of one step.

        It writes the new tokens' keys and values to the cache. Each new token sees its own sequence up to
        itself.
        """
        self.check(segments)
        # 1. What all layers share is computed once: the cells to write, and what each segment may see.
        new_cells = self._new_cells(segments)
        view = functools.cache(lambda number, window: self._view(segments[number], window))
        new_counts = [segment.new for segment in segments]
        softcap = self.config.attention_softcap

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # 2. Write first: a new token also sees itself and the new tokens before it.
            keys, values = self._layers[layer]
            keys.index_copy_(1, new_cells, k[0].to(keys.dtype))  # under autocast, k and v may be bf16
            values.index_copy_(1, new_cells, v[0].to(values.dtype))
            # 3. Attend segment by segment: sequences have different lengths and must not see each other.
            window, in_c = self.config.window(layer), softcap is None and can_attend(q, keys)
            outputs = []
            for number, queries in enumerate(q.split(new_counts, 2)):
                table, past, new = segments[number]
                if in_c and new > 1:
                    outputs.append(attend_in_c(queries, keys, values, table, self.block, past, window))
                else:  # views and masks are made here, because compiled code needs none
                    read, mask = view(number, window)
                    outputs.append(sdpa(queries, *read(layer), mask, mask is None and new > 1, softcap))
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

        return attend

    def _view(
        self, segment: Segment, window: int | None
    ) -> tuple[Callable[[int], tuple[Tensor, Tensor]], Tensor | None]:
        """Return what a segment's tokens see: a function from the layer to keys and values, and a mask.

        Keys and values are (1, K, S, d). The mask is None if plain causal attention is right.
        """
        table, past, new = segment
        # 1. Tokens before `first` are outside the sliding window of all new tokens.
        first = 0 if window is None else max(0, past + 1 - window)
        mask = None
        if new > 1 and (past or (window is not None and new > window)):
            positions = torch.arange(first, past + new, device=self.keys.device)
            mask = causal_mask(positions[past - first :], positions, window)
        skipped = first // self.block
        blocks = table[skipped : -(-(past + new) // self.block)]
        start, end = first - skipped * self.block, past + new - skipped * self.block
        # 2. Neighbouring blocks are read in place. The views of all layers are made at once: one by one, they
        #    would cost more than the attention itself.
        if all(after == before + 1 for before, after in itertools.pairwise(blocks)):
            cells = slice(blocks[0] * self.block + start, blocks[0] * self.block + end)
            keys, values = self.keys[:, None, :, cells].unbind(), self.values[:, None, :, cells].unbind()
            return lambda layer: (keys[layer], values[layer]), mask
        # 3. Others are gathered.
        index = torch.tensor(blocks, device=self.keys.device)

        def gathered(cells: Tensor) -> Tensor:
            by_block = cells.unflatten(1, (-1, self.block))  # (K, blocks, block, d)
            return by_block.index_select(1, index).flatten(1, 2)[None, :, start:end]

        def gather(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = self._layers[layer]
            return gathered(keys), gathered(values)

        return gather, mask

    def _new_cells(self, segments: Sequence[Segment]) -> Tensor:
        """Return the cell of each new token: (T,)."""
        block = self.block
        cells = [
            table[position // block] * block + position % block
            for table, past, new in segments
            for position in range(past, past + new)
        ]
        return torch.tensor(cells, device=self.keys.device)
