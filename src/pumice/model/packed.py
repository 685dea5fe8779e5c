"""Packed attention: many samples share one row without padding, and none sees another.

A run is a stretch of the row in which every token follows the one before it. A plain sample is one run.
Samples with a common prefix form a tree: the first sample is one run, and every other sample is a run that
branches off from an earlier one. A run sees the parts of the earlier runs that lead to it, and itself. Within
a run, attention is causal.

Shapes: T tokens of the row, r tokens of a run, S keys it sees, H heads, K key/value heads, d head dimension.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pumice.capability import GEMMA2, LLAMA, ROPE_SCALING, Capability, fields
from pumice.config import DecoderConfig, RopeScaling
from pumice.model.layers import causal_mask, sdpa
from pumice.model.transfer import numbers_on
from pumice.model.varlen import attend, can_attend

CAPABILITY = Capability(
    "attention over packs", {DecoderConfig: fields(f"{LLAMA} {GEMMA2}"), RopeScaling: fields(ROPE_SCALING)}
)


class Run(NamedTuple):
    """`length` tokens, preceded by parts of earlier runs: (index of the run, number of its first tokens)."""

    length: int
    before: tuple[tuple[int, int], ...] = ()


class _RunStarts(NamedTuple):
    """Where runs begin among the queries and the keys, on the device, for one call over all runs."""

    starts: Tensor  # (runs + 1,) int32
    key_starts: Tensor  # (runs + 1,) int32
    keys: Tensor | None  # which rows are the keys of each run in turn; None: a run's keys are its own rows
    longest: int
    longest_keys: int


class PackedAttention:
    """An `Attend` for one row (B = 1) of runs whose lengths add up to T."""

    def __init__(
        self, runs: Sequence[Run], config: DecoderConfig, device: torch.device | None = None
    ) -> None:
        """config: of the decoder. device: of the masks, which are made once for all layers."""
        CAPABILITY.check(config)
        self.runs, self.config, self.device = runs, config, device or torch.device("cpu")
        self.lengths = [run.length for run in runs]

    @functools.cached_property
    def _masks(self) -> dict[int | None, list[Tensor | None]]:
        windows = {self.config.window(layer) for layer in range(self.config.depth)}
        return {window: [_mask(run, window, self.device) for run in self.runs] for window in windows}

    def masks(self, layer: int) -> list[Tensor | None]:
        """Return the mask of each run in this layer; None where causal attention needs none."""
        return self._masks[self.config.window(layer)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, softcap = self.config.window(layer), self.config.attention_softcap
        # On a GPU, one kernel for all runs is faster than one call per run.
        if softcap is None and k.dtype == v.dtype == q.dtype and can_attend(q.device, q.dtype, q.shape[3]):
            return self._one_call(q, k, v, window)
        queries, keys, values = (x.split(self.lengths, 2) for x in (q, k, v))
        outputs = []
        for number, (run, mask) in enumerate(zip(self.runs, self.masks(layer), strict=True)):
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

    def _one_call(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        rows = self._rows
        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)  # (T, K, d)
        if rows.keys is not None:
            k, v = k.index_select(0, rows.keys), v.index_select(0, rows.keys)
        return attend(q, k, v, rows.starts, rows.key_starts, rows.longest, rows.longest_keys, window)

    @functools.cached_property
    def _rows(self) -> _RunStarts:
        """What all layers share: computed once, because each copy to the device would stop the host."""
        starts = [0, *itertools.accumulate(self.lengths)]
        index: list[int] = []
        key_starts = [0]
        for number, run in enumerate(self.runs):
            for before, count in run.before:
                index += range(starts[before], starts[before] + count)
            index += range(starts[number], starts[number + 1])
            key_starts.append(len(index))
        on_device = numbers_on(self.device, [starts, key_starts], torch.int32)
        branches = any(run.before for run in self.runs)
        return _RunStarts(
            starts=on_device[0],
            key_starts=on_device[1],
            keys=numbers_on(self.device, index) if branches else None,
            longest=max(self.lengths),
            longest_keys=max(end - start for start, end in itertools.pairwise(key_starts)),
        )


def _mask(run: Run, window: int | None, device: torch.device | None) -> Tensor | None:
    past = sum(count for _, count in run.before)
    # Plain causal attention needs no mask and is faster.
    if not past and (window is None or run.length <= window):
        return None
    keys = torch.arange(past + run.length, device=device)
    return causal_mask(keys[past:], keys, window)
