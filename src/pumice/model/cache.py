"""The KV cache keeps the keys and values of earlier tokens, so that a new token costs the work of one token.

It is one row of cells, each for one token. A sequence uses neighbouring cells, so that attention reads them
in place. `pumice.engine.cache` decides which sequence owns which cells. The new tokens of many sequences pass
the decoder end to end, as one row: some sequences bring one token (decode), others many (prefill).

Shapes: L layers, K key/value heads, C cells, d head dimension; B = 1, T new tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.model.layers import Attend, causal_mask, sdpa


class Segment(NamedTuple):
    """One sequence's part of a step: `new` tokens after `past` earlier ones, from cell `start` on."""

    start: int
    past: int
    new: int


class KVCache:
    """Keys and values (L, K, C, d) of up to `capacity` tokens. Only cells that were written are read."""

    def __init__(
        self, config: DecoderConfig, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.depth, config.kv_heads, capacity, config.head_dim)
        # Not set to zero: on a CPU, the system provides memory only when it is first written.
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.capacity = capacity
        self.window = config.sliding_window

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Return the size of one cell in bytes, over all layers."""
        return 2 * config.depth * config.kv_heads * config.head_dim * dtype.itemsize

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy `tokens` cells that start at `source` to those that start at `target`. They may overlap."""
        overlap = abs(source - target) < tokens
        for layer in self._layers:
            for tensor in layer:  # layer by layer, so that the temporary copy is small
                block = tensor[:, source : source + tokens]
                tensor[:, target : target + tokens] = block.clone() if overlap else block

    def positions(self, segments: Sequence[Segment]) -> Tensor:
        """Return the position of each new token in its sequence: (1, T)."""
        return self._count(segments, [s.past for s in segments])[None]

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise ValueError unless all tokens of the segments lie within the cache."""
        for start, past, new in segments:
            if start < 0 or past < 0 or new < 1 or start + past + new > self.capacity:
                raise ValueError(
                    f"cell {start}: {past} + {new} tokens do not fit in a cache of {self.capacity} cells"
                )

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """Return the attention of one step.

        It writes the new tokens' keys and values to the cache. Each new token sees its own sequence up to
        itself.
        """
        self.check(segments)
        # 1. What all layers share is computed once: the cells to write, and what each segment may see.
        new_cells = self._count(segments, [s.start + s.past for s in segments])
        views = [self._view(segment) for segment in segments]
        new_counts = [segment.new for segment in segments]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # 2. Write first: a new token also sees itself and the new tokens before it.
            keys, values = self._layers[layer]
            keys.index_copy_(1, new_cells, k[0].to(keys.dtype))  # under autocast, k and v may be bf16
            values.index_copy_(1, new_cells, v[0].to(values.dtype))
            # 3. Attend segment by segment: sequences have different lengths and must not see each other.
            outputs = [
                sdpa(queries, keys[layer], values[layer], mask, causal=mask is None and new > 1)
                for queries, new, (keys, values, mask) in zip(
                    q.split(new_counts, 2), new_counts, views, strict=True
                )
            ]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

        return attend

    def _view(self, segment: Segment) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
        """Return what a segment's tokens see: keys and values of each layer (1, K, S, d), and a mask.

        The mask is None if plain causal attention is right. The views of all layers are made at once: one by
        one, they would cost more than the attention itself.
        """
        start, past, new = segment
        # Tokens before `first_visible` are outside the sliding window of all new tokens.
        first_visible = 0 if self.window is None else max(0, past + 1 - self.window)
        mask = None
        if new > 1 and (past or (self.window is not None and new > self.window)):
            positions = torch.arange(first_visible, past + new, device=self.keys.device)
            mask = causal_mask(positions[past - first_visible :], positions, self.window)
        cells = slice(start + first_visible, start + past + new)
        return self.keys[:, None, :, cells].unbind(), self.values[:, None, :, cells].unbind(), mask

    def _count(self, segments: Sequence[Segment], starts: Sequence[int]) -> Tensor:
        """Count up from each start, one number for each new token of its segment: (T,)."""
        device = self.keys.device
        new_counts = [s.new for s in segments]
        if max(new_counts) == 1:  # the usual case: all sequences decode
            return torch.tensor(starts, device=device)
        ranges = [range(start, start + new) for start, new in zip(starts, new_counts, strict=True)]
        return torch.tensor([number for numbers in ranges for number in numbers], device=device)
