"""Attention of a pack: many documents in one row, none of which sees another, and no token padded.

Knows tensors and how a row is cut into runs. Does not know samples or why they share a beginning.

A run is a stretch of the row in which every token follows the one before it. A plain sample is one run.
Samples that share a beginning are a tree: the first is one run, and each of the others is a run that goes
on from a place inside an earlier one. A run's queries therefore meet the keys of its ancestors, in order of
depth, and their own: plain causal attention, whose mask exists only where there are ancestors.

Shapes: T tokens of the row, r tokens of a run, S keys it sees, H heads, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pumice.model.layers import causal_mask, sdpa


class Run(NamedTuple):
    """Tokens that follow each other, and what stands before the first: (earlier run, its first tokens)."""

    length: int
    before: tuple[tuple[int, int], ...] = ()


class Packed:
    """An `Attend` for one row (B = 1) of runs, the sum of whose lengths is T."""

    def __init__(
        self, runs: Sequence[Run], window: int | None = None, device: torch.device | None = None
    ) -> None:
        """window: as in `causal_mask`. device: where the masks are kept, which all layers share."""
        self.runs = runs
        self.lengths = [run.length for run in runs]
        self.masks: list[Tensor | None] = []
        for run in runs:
            past = sum(count for _, count in run.before)
            keys = torch.arange(past + run.length, device=device)
            plain = not past and (window is None or run.length <= window)
            self.masks.append(None if plain else causal_mask(keys[past:], keys, window))
        self.plain = all(mask is None for mask in self.masks)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.plain and len(self.runs) > 1 and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            return self._one_kernel(q, k, v)
        queries, keys, values = (x.split(self.lengths, 2) for x in (q, k, v))
        outputs = []
        for number, (run, mask) in enumerate(zip(self.runs, self.masks, strict=True)):
            seen, said = keys[number], values[number]
            if run.before:
                seen = torch.cat([*(keys[n][:, :, :count] for n, count in run.before), seen], 2)
                said = torch.cat([*(values[n][:, :, :count] for n, count in run.before), said], 2)
            # (1, r, H, d), so that the heads of a token lie together, as the next projection wants them
            outputs.append(sdpa(queries[number], seen, said, mask, causal=mask is None).transpose(1, 2))
        return torch.cat(outputs, 1).transpose(1, 2)

    def _one_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All runs in one call of FlashAttention's variable-length kernel, where this PyTorch has it."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:  # before PyTorch 2.10: one call a run is the same, only later
            queries, keys, values = (x.split(self.lengths, 2) for x in (q, k, v))
            runs = zip(queries, keys, values, strict=True)
            return torch.cat([sdpa(a, b, c, causal=True) for a, b, c in runs], 2)
        ends = torch.tensor([0, *self.lengths], device=q.device).cumsum(0, dtype=torch.int32)
        longest = max(self.lengths)
        one, two, three = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, d)
        mixed = varlen_attn(
            one, two, three, ends, ends, longest, longest,
            window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        assert isinstance(mixed, Tensor)
        return mixed.transpose(0, 1)[None]
