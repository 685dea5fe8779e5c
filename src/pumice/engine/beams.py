"""Beam search keeps several beginnings of an answer, and takes the one that ends with the best score.

Each hypothesis is a request of its own, which runs as any other. The prefix cache gives it the keys and
values that it shares with others. When all of a search have their logits, the best continuations become the
next hypotheses. The rules are those of transformers' `generate` with early_stopping=False. A hypothesis ends
with a stop token, or with the token that completes a stop text, as with transformers' `stop_strings`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from pumice.engine.requests import Finish, Request
from pumice.engine.scheduler import Scheduler


class Ended(NamedTuple):
    """A hypothesis that has ended. score: the sum of its log-probabilities, divided for its length."""

    score: float
    finish: Finish
    tokens: list[int]


class _State(NamedTuple):
    """Hypotheses that need their next token, their sums of log-probabilities, and what has ended; best first.

    It is replaced as a whole, so that an interrupted step leaves the old one or the new one.
    """

    hypotheses: list[Request]
    sums: list[float]
    ended: list[Ended]


class BeamSearch:
    """The search for the answer to one request."""

    def __init__(self, request: Request, stops: Collection[int]) -> None:
        self.request, self._stops = request, stops
        self._width = request.prompt.num_beams
        # Continuations that a step looks at: enough where all stop tokens are among them.
        self._count = max(2, 1 + len(stops)) * self._width
        self._state = _State([request], [0.0], [])
        # The likeliest tokens after hypotheses that were computed, by their place, and the log-probabilities.
        self._likeliest: dict[int, tuple[list[int], list[float]]] = {}

    @property
    def hypotheses(self) -> list[Request]:
        return self._state.hypotheses

    def add(self, hypothesis: Request, logits: Tensor) -> bool:
        """Take the logits (V,) after a hypothesis. Return whether those of all are there."""
        count = min(self._count, len(logits))
        best = logits.float().log_softmax(-1).topk(count)
        self._likeliest[self.hypotheses.index(hypothesis)] = best.indices.tolist(), best.values.tolist()
        return len(self._likeliest) == len(self.hypotheses)

    def advance(self) -> Ended | None:
        """Choose the next hypotheses, or return the answer."""
        parents, sums, ended = self._state
        # 1. Sort all continuations. Where stop texts end more of the first, fewer hypotheses go on, or none.
        continued = [
            (sums[place] + logprob, place, token)
            for place, likeliest in self._likeliest.items()
            for token, logprob in zip(*likeliest, strict=True)
        ]
        continued.sort(key=lambda one: -one[0])
        del continued[self._count :]
        # 2. The best go on. Those that end the answer count only if they are among the first `num_beams`.
        #    Where no cell is left, all of these end it.
        divisor = (len(parents[0].tokens) + 1) ** self.request.prompt.params.length_penalty
        is_last = parents[0].length == self.request.max_cells
        kept: list[tuple[float, int, int]] = []
        new_ended = list(ended)
        for rank, (total, place, token) in enumerate(continued):
            if rank >= self._width and (is_last or len(kept) == self._width):
                break
            tokens = parents[place].tokens
            is_stop = token in self._stops
            tokens = tokens if is_stop else [*tokens, token]
            stops = is_stop or self.request.prompt.holds_stop(tokens)
            if stops or is_last:
                if rank < self._width:
                    finish: Finish = "stop" if stops else "length"
                    new_ended.append(Ended(total / divisor, finish, tokens))
            elif len(kept) < self._width:
                kept.append((total, place, token))
        new_ended.sort(key=lambda one: -one.score)
        del new_ended[self._width :]
        # 3. The search is over where no hypothesis can become better than what has ended.
        is_full = len(new_ended) == self._width
        if not kept or (is_full and kept[0][0] / divisor <= new_ended[-1].score):
            return new_ended[0]
        hypotheses = [parents[place].continued(token) for _, place, token in kept]
        self._state = _State(hypotheses, [total for total, _, _ in kept], new_ended)
        self._likeliest = {}
        return None

    def recover(self) -> None:
        """Compute all hypotheses again, after a step that was interrupted."""
        self._likeliest = {}


class BeamSearches:
    """The searches that have begun and not ended."""

    def __init__(self, scheduler: Scheduler, stops: Collection[int]) -> None:
        self._scheduler, self._stops = scheduler, stops
        self._running: dict[Request, BeamSearch] = {}  # by the request that was submitted

    def add(self, hypothesis: Request, logits: Tensor) -> Ended | None:
        """Take the logits (V,) after a hypothesis, or after a prompt. Return the answer if it is found."""
        origin = hypothesis.origin = hypothesis.submitted
        if (search := self._running.get(origin)) is None:
            search = self._running[origin] = BeamSearch(origin, self._stops)
        # It gives up its slot. What it has computed stays in the prefix cache, for those that continue it.
        is_complete = search.add(hypothesis, logits)
        self._scheduler.remove(hypothesis)
        answer = search.advance() if is_complete else None
        if is_complete and answer is None:
            self._scheduler.waiting.extendleft(reversed(search.hypotheses))
        return answer

    def end(self, origin: Request) -> None:
        """Remove the search for the answer to a request, with its hypotheses."""
        if (search := self._running.get(origin)) is not None:
            for hypothesis in search.hypotheses:
                self._scheduler.remove(hypothesis)
            del self._running[origin]

    def recover(self) -> None:
        """Let hypotheses that an interrupted step has lost wait again."""
        known = {*self._scheduler.waiting, *self._scheduler.running}
        for search in self._running.values():
            search.recover()
            lost = [one for one in search.hypotheses if one not in known]
            self._scheduler.waiting.extendleft(reversed(lost))
