"""The KV cache keeps the keys and values of earlier tokens, so that a new token costs the work of one token.

It is made of blocks of cells, a cell for each token. A sequence has a table, which names its blocks in order,
so sequences that begin alike share blocks (vLLM, arXiv 2309.06180). `pumice.engine.cache` decides which
sequence holds which blocks. The new tokens of many sequences pass the decoder end to end, as one row: some
sequences bring one token (decode), others many (prefill).

Shapes: L layers, K key/value heads, C cells, d head dimension; B = 1, T new tokens of all sequences.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pumice.capability import GEMMA2, LLAMA, ROPE_SCALING, Capability, fields
from pumice.config import DecoderConfig, RopeScaling
from pumice.kernels.attention import attend as attend_in_c
from pumice.kernels.attention import can_attend
from pumice.model import varlen
from pumice.model.layers import Attend, causal_mask, sdpa
from pumice.model.transfer import numbers_on, to_device

BLOCK = 64  # tokens of a block
_LOG = logging.getLogger("pumice")
AGREEMENT = 2e-2  # of values of about 1, in 16 bits, between one call for all sequences and one for each
CAPABILITY = Capability(
    "attention with a cache", {DecoderConfig: fields(f"{LLAMA} {GEMMA2}"), RopeScaling: fields(ROPE_SCALING)}
)


class Segment(NamedTuple):
    """One sequence's part of a step: `new` tokens after `past` earlier ones, in the blocks of its table."""

    table: Sequence[int]
    past: int
    new: int


class StepNumbers(NamedTuple):
    """What one call of attention for N sequences reads beside keys and values.

    positions: (1, T). cells: (T,), where the new tokens are written. The others are int32: query_starts and
    key_starts (N + 1,), used (N,) tokens of each sequence, and table (N, blocks).
    """

    positions: Tensor
    cells: Tensor
    query_starts: Tensor
    key_starts: Tensor
    used: Tensor
    table: Tensor


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
        one_call: bool = False,
    ) -> None:
        """one_call: attend with one call of FlashAttention's kernel for all sequences, where it can."""
        CAPABILITY.check(config)
        self.one_call = one_call and can_use_one_call(config, device, dtype)
        if self.one_call:
            block = -(-block // varlen.PAGE) * varlen.PAGE
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
        return numbers_on(self.keys.device, [_positions(segments)])

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
        if self.one_call:
            return self._attend_at_once(segments)
        # 1. What all layers share is computed once: the cells to write, and what each segment may see.
        new_cells = numbers_on(self.keys.device, self._new_cells(segments))
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

    def step_numbers(self, segments: Sequence[Segment], blocks: int) -> StepNumbers:
        """Return the numbers of a step, on the host. blocks: the columns of the table."""
        lengths = [segment.past + segment.new for segment in segments]
        starts = [0, *itertools.accumulate(segment.new for segment in segments)]
        tables = [[*segment.table, *[0] * (blocks - len(segment.table))] for segment in segments]
        int32 = functools.partial(torch.tensor, dtype=torch.int32)
        return StepNumbers(
            torch.tensor([_positions(segments)]), torch.tensor(self._new_cells(segments)), int32(starts),
            int32([0, *itertools.accumulate(lengths)]), int32(lengths), int32(tables),
        )  # fmt: skip

    def attend_at_once(self, numbers: StepNumbers, longest: int, longest_keys: int) -> Attend:
        """As `attend`, in one call for all segments: keys are read where they lie, through the tables.

        numbers: on the device. longest, longest_keys: the most new tokens and the most tokens of a segment.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._layers[layer]
            keys.index_copy_(1, numbers.cells, k[0].to(keys.dtype))
            values.index_copy_(1, numbers.cells, v[0].to(values.dtype))
            # (K, C, d) as (blocks, block, K, d)
            key_pages, value_pages = (
                x.unflatten(1, (-1, self.block)).permute(1, 2, 0, 3) for x in (keys, values)
            )
            return varlen.attend(
                q.to(keys.dtype), key_pages, value_pages, numbers.query_starts, numbers.key_starts, longest,
                longest_keys, self.config.window(layer), seqused_k=numbers.used, block_table=numbers.table,
            ).to(q.dtype)  # fmt: skip

        return attend

    def _attend_at_once(self, segments: Sequence[Segment]) -> Attend:
        numbers = self.step_numbers(segments, max(len(segment.table) for segment in segments))
        on_device = StepNumbers(*(to_device(tensor, self.keys.device) for tensor in numbers))
        longest_keys = max(segment.past + segment.new for segment in segments)
        return self.attend_at_once(on_device, max(segment.new for segment in segments), longest_keys)

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
        index = numbers_on(self.keys.device, blocks)

        def gathered(cells: Tensor) -> Tensor:
            by_block = cells.unflatten(1, (-1, self.block))  # (K, blocks, block, d)
            return by_block.index_select(1, index).flatten(1, 2)[None, :, start:end]

        def gather(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = self._layers[layer]
            return gathered(keys), gathered(values)

        return gather, mask

    def _new_cells(self, segments: Sequence[Segment]) -> list[int]:
        """Return the cell of each new token: (T,)."""
        block = self.block
        return [
            table[position // block] * block + position % block
            for table, past, new in segments
            for position in range(past, past + new)
        ]


def _positions(segments: Sequence[Segment]) -> list[int]:
    """Return the position of each new token in its sequence: (T,)."""
    return [position for _, past, new in segments for position in range(past, past + new)]


def can_use_one_call(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether one call for all sequences is possible here and gives what one call for each gives.

    It is tried with sequences that begin, go on, and decode, in blocks that are no neighbours.
    """
    if config.attention_softcap is not None or not varlen.can_attend(
        device, dtype, config.head_dim, paged=True
    ):
        return False
    single = dataclasses.replace(config, depth=1)
    page = varlen.PAGE
    segments = [Segment((2, 0), page + 3, 1), Segment((3,), 0, 9), Segment((1,), 5, 7), Segment((4,), 40, 1)]
    generator = torch.Generator(device).manual_seed(0)

    def noise(heads: int, tokens: int) -> Tensor:
        shape = (1, heads, tokens, config.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    tokens = sum(segment.new for segment in segments)
    q, k, v = noise(config.heads, tokens), noise(config.kv_heads, tokens), noise(config.kv_heads, tokens)
    plain = KVCache(single, 5 * page, device, dtype, page)
    for tensor in (plain.keys, plain.values):
        tensor.copy_(noise(config.kv_heads, plain.capacity))
    with torch.inference_mode():
        expected = plain.attend(segments)(0, q, k, v)
        try:
            found = plain._attend_at_once(segments)(0, q, k, v)
        except (RuntimeError, TypeError, ValueError) as error:  # another PyTorch may ask for more
            _LOG.warning(
                "attention in one call is not possible here (%s); sequences attend one by one", error
            )
            return False
    apart = float((found.float() - expected.float()).abs().max())
    if not apart <= AGREEMENT:
        _LOG.warning("attention in one call differs by %.1e; sequences attend one by one", apart)
        return False
    return True
