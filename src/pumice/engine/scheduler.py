"""The scheduler decides which requests run, and how many tokens of each the next step computes.

Every step decodes one token of each answer in progress. Prompts share `chunk` tokens per step, first come,
first served, so that a long prompt does not stall the answers. A prompt waits if a running prompt is about to
compute the prefix that both share.
"""

from __future__ import annotations

from collections import deque

from pumice.engine.cache import Match, PrefixCache, common_prefix
from pumice.engine.requests import Request
from pumice.errors import WorkError, counted

SLOT_GROWTH = 128  # tokens that an answer's slot grows by when it is full
SCORED = 64  # tokens of a prompt whose log-probabilities one step computes: each takes the whole vocabulary
MIN_SHARED_PREFIX = 16  # tokens; a prompt waits for a shared prefix only if it is this long


class Scheduler:
    """Admits, plans and preempts requests.

    slots: requests that may run together. chunk: prompt tokens per step.
    """

    def __init__(self, slots: int, chunk: int, prefix_cache: PrefixCache) -> None:
        self.slots, self.chunk, self.prefix_cache = slots, chunk, prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.prompt_tokens = 0  # of all requests admitted so far
        self.prefix_hits = 0  # of `prompt_tokens`, those found in the prefix cache

    def plan(self) -> list[tuple[Request, int]]:
        """Return requests, and how many tokens of each the next step computes. Empty if there is no request.

        Raise WorkError if nothing runs and the first that waits cannot be started for want of memory, or
        RuntimeError if it cannot for another reason.
        """
        # 1. Admit requests until slots or cells run out.
        self._admit()
        # 2. If a step was interrupted before it chose a token, compute that request's last token again.
        for request in self.running:
            if request.remaining == 0 and request.slot is not None:
                request.slot.length -= 1
        # 3. Give answers whose slot is full more cells. This may preempt requests, so look again at
        #    `running`.
        for request in list(self.running):
            if request in self.running and request.remaining == 1:
                self._ensure_free_cell(request)
        # 4. One token of each answer, then prompt chunks until the budget is used.
        budget = self.chunk
        plan = [(request, 1) for request in self.running if request.remaining == 1]
        for request in self.running:
            if request.remaining > 1 and budget:
                count = min(budget, request.remaining, SCORED if request.scores_prompt else budget)
                budget -= count
                plan.append((request, count))
        if self.waiting and not plan:
            if self.prefix_cache.lacked_memory:
                raise WorkError(
                    "no memory is left for the KV cache; close other programs or ask for a shorter answer"
                )
            raise RuntimeError(f"{counted(len(self.waiting), 'request', 'wait')}, and none can be started")
        return plan

    def remove(self, request: Request) -> None:
        """Remove a running or waiting request. Its computed tokens stay in the prefix cache."""
        if request.slot is not None:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def recover(self) -> None:
        """Put the requests and the prefix cache in order after a step that was interrupted."""
        # One that was being started or preempted may be in both lists, or have a slot while it waits.
        self.waiting = deque(request for request in self.waiting if request not in self.running)
        for request in self.waiting:
            request.slot = None
        slots = [request.slot for request in self.running if request.slot is not None]
        self.prefix_cache.recover(slots)

    def _admit(self) -> None:
        """Start waiting requests in order, until one does not fit."""
        for request in list(self.waiting):
            if len(self.running) >= self.slots:
                return
            # The last token is always computed: its hidden state gives the first token of the answer.
            # What is in the cache has no logits: a prompt whose tokens are scored is computed from its first.
            found = 0 if request.scores_prompt else request.length - 1
            match = self.prefix_cache.match(request.token_hashes[:found])
            if found and self._should_wait(request, match.length):
                continue
            if not self._start(request, match):
                return
            self.waiting.remove(request)

    def _should_wait(self, request: Request, shared: int) -> bool:
        """Return whether a running prompt will soon have computed a longer shared prefix."""
        if not self.prefix_cache.keep_finished:
            return False
        token_hashes = request.token_hashes[:-1]
        return any(
            other.remaining > 1
            and common_prefix(other.token_hashes, token_hashes) >= max(MIN_SHARED_PREFIX, shared + 1)
            for other in self.running
        )

    def _start(self, request: Request, match: Match) -> bool:
        """Give a request a slot that begins with the matching tokens. Return False if there is no room."""
        if request.scores_prompt:  # it was preempted, and begins again
            request.prompt_logprobs.clear()
        capacity = min(request.max_cells, request.length + SLOT_GROWTH)
        request.slot = self.prefix_cache.open(request.token_hashes, match, capacity)
        if request.slot is None and not self.running:  # such as without memory for more
            request.slot = self.prefix_cache.open(request.token_hashes, match, request.length)
        if request.slot is None:
            return False
        # A preempted request starts again here: count its prompt only once.
        if not request.admitted:
            request.admitted = True
            request.cached_tokens = request.slot.length
            self.prefix_hits += request.slot.length
            self.prompt_tokens += request.length
        self.running.append(request)
        return True

    def _ensure_free_cell(self, request: Request) -> None:
        """Make room for one more token of an answer. Preempt the newest requests if nothing else helps."""
        slot = request.slot
        if slot is None or slot.length < len(slot.blocks) * self.prefix_cache.block:
            return
        while not self.prefix_cache.grow(slot, min(request.max_cells, slot.length + SLOT_GROWTH)):
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return

    def _preempt(self, request: Request) -> None:
        """Stop a running request and put it first in the queue. It continues later from its last token."""
        self.waiting.appendleft(request)  # first, so that an interruption does not lose it
        self.running.remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        if request.slot is not None:
            self.prefix_cache.release(request.slot)
            request.slot = None
