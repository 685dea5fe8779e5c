"""The KV cache: what the decoder has seen, so that a new token costs one token.

Knows tensors only. Slots hold independent sequences; an `Attend` made by `KVCache.attend` appends
the new keys and values of the named slots and lets each query see its own slot's past.

Shapes: L layers, B slots in use, K key/value heads, T new tokens, C capacity, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.model.layers import Attend, causal_mask, sdpa


class KVCache:
    """Room for `slots` sequences of up to `capacity` tokens each.

    lengths[slot] is the number of tokens kept; 0 <= lengths[slot] <= capacity always.
    """

    def __init__(
        self, config: DecoderConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.depth, slots, config.kv_heads, capacity, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * slots
        self.capacity = capacity
        self.window = config.sliding_window

    def reserve(self, capacity: int) -> None:
        """Grow to at least this capacity; what is kept stays."""
        if capacity > self.capacity:
            grown = (*self.keys.shape[:3], capacity - self.capacity, self.keys.shape[4])
            self.keys = torch.cat((self.keys, self.keys.new_zeros(grown)), 3)
            self.values = torch.cat((self.values, self.values.new_zeros(grown)), 3)
            self.capacity = capacity

    def positions(self, slots: list[int], tokens: int) -> Tensor:
        """Where the next `tokens` tokens of each slot stand: (B, tokens)."""
        starts = torch.tensor([self.lengths[s] for s in slots], device=self.keys.device)
        return starts[:, None] + torch.arange(tokens, device=self.keys.device)

    def attend(self, slots: list[int], tokens: int) -> Attend:
        """Append `tokens` tokens to each slot (the lengths grow now) and attend over each slot's past."""
        starts = [self.lengths[s] for s in slots]
        for slot, start in zip(slots, starts, strict=True):
            if start + tokens > self.capacity:
                raise ValueError(f"slot {slot}: {start} + {tokens} tokens do not fit in {self.capacity}")
        positions = self.positions(slots, tokens)
        for slot in slots:
            self.lengths[slot] += tokens
        if len(slots) == 1:
            return self._attend_one(slots[0], starts[0], tokens)
        longest = max(starts) + tokens
        mask = causal_mask(positions, torch.arange(longest, device=positions.device), self.window)[:, None]
        rows = torch.tensor(slots, device=positions.device)[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions] = k.transpose(1, 2)
            values[rows, :, positions] = v.transpose(1, 2)
            return sdpa(q, keys[rows[:, 0], :, :longest], values[rows[:, 0], :, :longest], mask)

        return attend

    def _attend_one(self, slot: int, start: int, tokens: int) -> Attend:
        end = start + tokens
        mask = None
        if (tokens > 1 and start) or (self.window is not None and end > self.window):
            order = torch.arange(end, device=self.keys.device)
            mask = causal_mask(order[start:], order, self.window)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer, slot], self.values[layer, slot]
            keys[:, start:end], values[:, start:end] = k[0], v[0]
            causal = mask is None and tokens > 1
            return sdpa(q, keys[None, :, :end], values[None, :, :end], mask, causal)

        return attend
