"""The KV cache: what the decoder has seen, so that a new token costs one token.

Knows tensors only. The cache is one row of places for tokens; a sequence owns places that lie side by
side, so that attention reads them where they stand. Who owns which is decided elsewhere
(`pumice.engine.cache`). The tokens of many sequences pass the decoder end to end, as one row: some
sequences bring one token (decode), others many (prefill).

Shapes: L layers, K key/value heads, C places, d head width; B = 1, T new tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.model.layers import Attend, causal_mask, sdpa


class Segment(NamedTuple):
    """One sequence's part of a step: `new` tokens after `past` ones, kept from the place `start` on."""

    start: int
    past: int
    new: int


class KVCache:
    """Keys and values of up to `places` tokens in all. Only places that were written are ever read."""

    def __init__(self, config: DecoderConfig, places: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.depth, config.kv_heads, places, config.head_dim)
        # Not zeroed: on a CPU, memory that was never written to is never taken from the system.
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.places = places
        self.window = config.sliding_window

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        return 2 * config.depth * config.kv_heads * config.head_dim * dtype.itemsize

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy `tokens` places from `source` on to those from `target` on; the two may overlap."""
        overlap = abs(source - target) < tokens
        for pair in self._layers:
            for kept in pair:  # layer by layer, so that the copy in between is small
                moved = kept[:, source : source + tokens]
                kept[:, target : target + tokens] = moved.clone() if overlap else moved

    def positions(self, segments: Sequence[Segment]) -> Tensor:
        """Where each new token stands in its sequence: (1, T)."""
        return self._count(segments, [s.past for s in segments])[None]

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise ValueError unless all new tokens have places."""
        for start, past, new in segments:
            if start < 0 or past < 0 or new < 1 or start + past + new > self.places:
                raise ValueError(f"place {start}: {past} + {new} tokens do not fit in {self.places} places")

    def attend(self, segments: Sequence[Segment]) -> Attend:
        """Keep the new tokens' keys and values, and let each see its own sequence up to itself."""
        self.check(segments)
        where = self._count(segments, [s.start + s.past for s in segments])
        views = [self._view(segment) for segment in segments]
        news = [segment.new for segment in segments]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._layers[layer]
            keys.index_copy_(1, where, k[0].to(keys.dtype))  # autocast may have made them shorter
            values.index_copy_(1, where, v[0].to(values.dtype))
            outputs = [
                sdpa(mine, keys[layer], values[layer], mask, causal=mask is None and new > 1)
                for mine, new, (keys, values, mask) in zip(q.split(news, 2), news, views, strict=True)
            ]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

        return attend

    def _view(self, segment: Segment) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
        """(keys and values of each layer that its tokens see, (1, K, S, d), mask unless causal).

        Cut for all layers at once: one by one it would cost more than it takes to attend to them.
        """
        start, past, new = segment
        seen = 0 if self.window is None else max(0, past + 1 - self.window)
        mask = None
        if new > 1 and (past or (self.window is not None and new > self.window)):
            order = torch.arange(seen, past + new, device=self.keys.device)
            mask = causal_mask(order[past - seen :], order, self.window)
        places = slice(start + seen, start + past + new)
        return self.keys[:, None, :, places].unbind(), self.values[:, None, :, places].unbind(), mask

    def _count(self, segments: Sequence[Segment], starts: Sequence[int]) -> Tensor:
        """Each segment's numbers from its start on, one segment after the other: (T,)."""
        device = self.keys.device
        news = [s.new for s in segments]
        if max(news) == 1:
            return torch.tensor(starts, device=device)
        counted = [range(start, start + new) for start, new in zip(starts, news, strict=True)]
        return torch.tensor([n for numbers in counted for n in numbers], device=device)
