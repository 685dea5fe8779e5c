"""Which requests run, and how many tokens of each go into the next step.

Knows: requests and the prefix cache, as numbers. Does not know: tensors, threads.

Every answer in progress gets its one token in every step. Prompts share `chunk` tokens per step, in
the order in which they came, so that a long one does not stall the others. A prompt that shares its
beginning with one that is being computed waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pumice.engine.cache import PrefixCache, Region, common
from pumice.engine.requests import Request

ROOM = 128  # places that an answer gets at a time
WORTH = 16  # a shared beginning of so many tokens is worth waiting for


class Scheduler:
    """copy(source, target, tokens) moves what stands in the KV cache."""

    def __init__(
        self, slots: int, chunk: int, prefix: PrefixCache, copy: Callable[[int, int, int], None]
    ) -> None:
        self.slots, self.chunk, self.prefix, self.copy = slots, chunk, prefix, copy
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they were admitted
        self.prompt_tokens = 0  # of the requests admitted so far
        self.hits = 0  # of these, found in the prefix cache

    def plan(self) -> list[tuple[Request, int]]:
        """Requests and how many of their tokens are computed next; empty when nothing is to do."""
        self._admit()
        for request in self.running:
            if request.remaining == 0 and request.region is not None:
                request.region.length -= 1  # a step was interrupted before it chose the next token
        for request in list(self.running):
            if request in self.running and request.remaining == 1:
                self._make_room(request)
        budget = self.chunk
        plan = [(request, 1) for request in self.running if request.remaining == 1]
        for request in self.running:
            if request.remaining > 1 and budget:
                share = min(budget, request.remaining)
                budget -= share
                plan.append((request, share))
        return plan

    def remove(self, request: Request) -> None:
        """Wherever it is; what was computed for it stays in the prefix cache."""
        if request.region is not None:
            self.prefix.release(request.region)
            request.region = None
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _admit(self) -> None:
        for request in list(self.waiting):
            if len(self.running) >= self.slots:
                return
            source, shared = self.prefix.match(request.keys[:-1])
            if self._worth_waiting(request, shared):
                continue
            if not self._start(request, source, shared):
                return
            self.waiting.remove(request)

    def _worth_waiting(self, request: Request, shared: int) -> bool:
        """Whether a running prompt will soon have computed more of the beginning than is there now."""
        if not self.prefix.keep:
            return False
        keys = request.keys[:-1]
        return any(
            other.remaining > 1 and common(other.keys, keys) >= max(WORTH, shared + 1)
            for other in self.running
        )

    def _start(self, request: Request, source: Region | None, shared: int) -> bool:
        room = min(request.limit, request.count + ROOM)
        # All of an idle region lives on in the new one: the next turn of a conversation, say.
        whole = source is not None and source.length == shared and source.start in self.prefix.idle
        if source is not None and whole and self.prefix.wake(source, room):
            request.region = source
        else:
            region = self.prefix.take(room, source)
            if region is None and not self.running:  # nothing but what it shares is in the way
                region, source, shared = self.prefix.take(room), None, 0
            if region is None:
                return False
            if source is not None:
                self.copy(source.start, region.start, shared)
                self.prefix.touch(source)
                if whole:
                    self.prefix.drop(source)
            region.append(request.keys[:shared])
            request.region = region
        if not request.tokens:
            request.cached_tokens = shared
            self.hits += shared
            self.prompt_tokens += request.count
        self.running.append(request)
        return True

    def _make_room(self, request: Request) -> None:
        """Let an answer grow by a token, at the cost of the newest requests if nothing else helps."""
        region = request.region
        if region is None or region.length < region.room:
            return
        wider = min(request.limit, region.length + ROOM)
        while not self.prefix.grow(region, wider):
            moved = self.prefix.take(wider)
            if moved is not None:
                self.copy(region.start, moved.start, region.length)
                moved.append(region.keys)
                self.prefix.drop(region)
                request.region = moved
                return
            newest = self.running[-1]
            self._put_back(newest)
            if newest is request:
                return

    def _put_back(self, request: Request) -> None:
        """It waits again, and goes on later where it was."""
        if request.region is not None:
            self.prefix.release(request.region)
            request.region = None
        self.running.remove(request)
        self.waiting.appendleft(request)
