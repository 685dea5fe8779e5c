"""Answers on CUDA as graphs: the host starts one graph for each step, instead of some hundred kernels.

A graph repeats what was captured, in the memory where it was captured. So each of some numbers of requests
has a graph, with buffers that a step fills. A step of fewer requests fills up with copies of its last one,
which write the same keys and values to the same cells.

Shapes: R requests, each with one new token; V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pumice.model.cache import AGREEMENT, KVCache, Segment, StepNumbers
from pumice.model.decoder import Decoder

REQUESTS = (1, 2, 4, 8, 16, 32)  # of the graphs
_LOG = logging.getLogger(__name__)


class Graph(NamedTuple):
    """A captured step. ids: (R,); replay: computes `logits` (R, V) from what is in `ids` and `numbers`."""

    ids: Tensor
    numbers: StepNumbers
    replay: Callable[[], object]
    logits: Tensor


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Capture what `run` computes. Return a function that computes it again, and the tensor that it fills."""
    # Once before: libraries set themselves up in their first call, which a graph cannot hold.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # PyTorch's own stream for it stays on the first GPU that captures. Other threads may allocate meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = run()
    return graph.replay, out


class DecodeGraphs:
    """The graphs of a decoder over a KV cache that attends in one call."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._graphs: dict[int, Graph] = {}
        self._refused = not cache.one_call

    def logits(self, ids: np.ndarray, segments: Sequence[Segment]) -> Tensor | None:
        """Return the logits (R, V) after the tokens `ids` (R,), in a buffer that the next step overwrites.

        None where there are more requests than a graph takes, where graphs are not right here, or where the
        first logits of a size are not finite, which would prove nothing.
        """
        size = next((size for size in REQUESTS if size >= len(segments)), None)
        if self._refused or size is None:
            return None
        self._cache.check(segments)
        # 1. Fill the buffers of the graph.
        missing = size - len(segments)
        blocks = -(-self._decoder.config.context // self._cache.block)
        numbers = self._cache.step_numbers([*segments, *[segments[-1]] * missing], blocks)
        values = (torch.from_numpy(np.pad(ids, (0, missing), "edge")), *numbers)
        graph = self._graphs.get(size)
        if graph is not None:
            for buffer, value in zip((graph.ids, *graph.numbers), values, strict=True):
                buffer.copy_(value.pin_memory(), non_blocking=True)
            graph.replay()
            return graph.logits[: len(segments)]
        # 2. The first step of this size is captured.
        graph = self._capture(*(value.to(self._cache.keys.device) for value in values))
        if graph is None:
            return None
        self._graphs[size] = graph
        return graph.logits[: len(segments)]

    def _capture(self, ids: Tensor, *buffers: Tensor) -> Graph | None:
        """Capture a step. Return None unless it gives the logits of the plain loop.

        Where it gives others, say so and refuse graphs from here on.
        """
        numbers, decoder = StepNumbers(*buffers), self._decoder

        def run() -> Tensor:
            attend = self._cache.attend_at_once(numbers, 1, decoder.config.context)
            hidden = decoder(decoder.embed(ids)[None], numbers.positions, attend)
            return decoder.logits(hidden[0])

        expected = run()
        if not expected.isfinite().all():  # a fault of the model or a picture, which the engine reports
            return None
        try:
            with torch.cuda.device(ids.device):  # a server's thread is on the first GPU, the model may not be
                replay, logits = capture(run)
            replay()
        except RuntimeError as error:  # an operation that a graph cannot hold
            _LOG.warning("CUDA graphs are not possible here (%s); steps run without", error)
            self._refused = True
            return None
        apart = float((logits - expected).abs().max() / expected.abs().max())
        if not apart <= AGREEMENT:
            _LOG.warning("a CUDA graph differs by %.1e of the largest logit; steps run without", apart)
            self._refused = True
            return None
        return Graph(ids, numbers, replay, logits)
