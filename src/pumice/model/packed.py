"""Packed attention: many samples share one row without padding, and none sees another.

A run is a stretch of the row in which every token follows the one before it. A plain sample is one run.
Samples with a common prefix form a tree: the first sample is one run, and every other sample is a run that
branches off from an earlier one. A run sees the parts of the earlier runs that lead to it, and itself. Within
a run, attention is causal.

Shapes: T tokens of the row, r tokens of a run, S keys it sees, H heads, K key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pumice.config import DecoderConfig
from pumice.model.layers import causal_mask, sdpa


class Run(NamedTuple):
    """`length` tokens, preceded by parts of earlier runs: (index of the run, number of its first tokens)."""

    length: int
    before: tuple[tuple[int, int], ...] = ()


class PackedAttention:
    """An `Attend` for one row (B = 1) of runs whose lengths add up to T."""

    def __init__(
        self, runs: Sequence[Run], config: DecoderConfig, device: torch.device | None = None
    ) -> None:
        """config: of the decoder. device: of the masks, which are made once for all layers."""
        self.runs, self.config = runs, config
        self.lengths = [run.length for run in runs]
        windows = {config.window(layer) for layer in range(config.depth)}
        self._masks = {window: [_mask(run, window, device) for run in runs] for window in windows}

    def masks(self, layer: int) -> list[Tensor | None]:
        """Return the mask of each run in this layer; None where causal attention needs none."""
        return self._masks[self.config.window(layer)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks, softcap = self.masks(layer), self.config.attention_softcap
        # On a GPU, one kernel for all runs is faster than one call per run. It takes no masks and no cap.
        plain = softcap is None and all(mask is None for mask in masks)
        if plain and len(self.runs) > 1 and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            return self._one_kernel(q, k, v)
        queries, keys, values = (x.split(self.lengths, 2) for x in (q, k, v))
        outputs = []
        for number, (run, mask) in enumerate(zip(self.runs, masks, strict=True)):
            # A run sees the parts of earlier runs that lead to it, then itself.
            run_keys, run_values = keys[number], values[number]
            if run.before:
                run_keys = torch.cat([*(keys[n][:, :, :count] for n, count in run.before), run_keys], 2)
                run_values = torch.cat([*(values[n][:, :, :count] for n, count in run.before), run_values], 2)
            mixed = sdpa(queries[number], run_keys, run_values, mask, mask is None, softcap)
            # As (1, r, H, d), so that the heads of a token are adjacent in memory, as the next layer needs
            # them.
            outputs.append(mixed.transpose(1, 2))
        return torch.cat(outputs, 1).transpose(1, 2)

    def _one_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in one call of FlashAttention's variable-length kernel, if this PyTorch has it."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:  # before PyTorch 2.10: one call per run gives the same, more slowly
            queries, keys, values = (x.split(self.lengths, 2) for x in (q, k, v))
            runs = zip(queries, keys, values, strict=True)
            return torch.cat([sdpa(a, b, c, causal=True) for a, b, c in runs], 2)
        ends = torch.tensor([0, *self.lengths], device=q.device).cumsum(0, dtype=torch.int32)
        longest = max(self.lengths)
        packed_q, packed_k, packed_v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, d)
        mixed = varlen_attn(
            packed_q, packed_k, packed_v, ends, ends, longest, longest,
            window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        assert isinstance(mixed, Tensor)
        return mixed.transpose(0, 1)[None]


def _mask(run: Run, window: int | None, device: torch.device | None) -> Tensor | None:
    past = sum(count for _, count in run.before)
    # Plain causal attention needs no mask and is faster.
    if not past and (window is None or run.length <= window):
        return None
    keys = torch.arange(past + run.length, device=device)
    return causal_mask(keys[past:], keys, window)
