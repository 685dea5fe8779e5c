"""Which requests run, and how many tokens of each go into the next step.

Knows: requests and the prefix cache, as numbers. Does not know: tensors, threads.

Every answer in progress gets its one token in every step. Prompts share `chunk` tokens per step, in
the order in which they came, so that a long one does not stall the others. A prompt that shares its
beginning with one that is being computed waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pumice.engine.cache import CacheSlot, PrefixCache, common
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
        """Requests and how many of their tokens are computed next; empty only when no request is here."""
        # 1. Free what an interrupted plan had allocated for nobody, or a request might never fit again.
        owned = {id(request.region) for request in self.running}
        for region in [region for region in self.prefix.busy.values() if id(region) not in owned]:
            self.prefix.drop(region)
        # 2. Admit requests while slots and places last.
        self._admit()
        # 3. Repeat what an interrupted step left, and give answers whose region is full more places.
        for request in self.running:
            if request.remaining == 0 and request.region is not None:
                request.region.length -= 1  # a step was interrupted before it chose the next token
        for request in list(self.running):
            if request in self.running and request.remaining == 1:
                self._make_room(request)
        # 4. One token of each answer, then prompts until the budget is used.
        budget = self.chunk
        plan = [(request, 1) for request in self.running if request.remaining == 1]
        for request in self.running:
            if request.remaining > 1 and budget:
                share = min(budget, request.remaining)
                budget -= share
                plan.append((request, share))
        if self.waiting and not plan:
            raise RuntimeError(f"{len(self.waiting)} requests wait, and none of them can be started")
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

    def _start(self, request: Request, source: CacheSlot | None, shared: int) -> bool:
        room = min(request.limit, request.count + ROOM)
        # All of an idle region lives on in the new one: the next turn of a conversation, say.
        whole = source is not None and source.length == shared and source.start in self.prefix.idle
        if source is not None and whole and self._wake(source, shared, room):
            region = source
        elif (taken := self.prefix.take(room, source)) is not None:
            region = taken
            if source is not None:
                self.copy(source.start, region.start, shared)
                self.prefix.touch(source)
                if whole:
                    self.prefix.drop(source)
            region.append(request.keys[:shared])
        # Nothing runs, or nothing is lost: then what it shares stays, and the rest of the source gives way.
        elif source is not None and (whole or not self.running) and self._wake(source, shared, room, True):
            region = source
        else:
            return False
        request.region = region
        if not request.admitted:
            request.admitted = True
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
        while not self._widen(request, region, min(request.limit, region.length + ROOM)):
            newest = self.running[-1]
            self._put_back(newest)
            if newest is request:
                return

    def _widen(self, request: Request, region: CacheSlot, room: int) -> bool:
        """Give a region `room` places. False only if another request runs: the idle give way."""
        if self._grow(region, room):
            return True
        if (moved := self.prefix.take(room)) is None:
            return self._grow(region, room, evict=True)
        self.copy(region.start, moved.start, region.length)
        moved.append(region.keys)
        self.prefix.drop(region)
        request.region = moved
        return True

    def _grow(self, region: CacheSlot, room: int, evict: bool = False) -> bool:
        start = region.start
        return self.prefix.grow(region, room, evict=evict) and self._follow(region, start)

    def _wake(self, region: CacheSlot, length: int, room: int, evict: bool = False) -> bool:
        start = region.start
        return self.prefix.wake(region, length, room, evict=evict) and self._follow(region, start)

    def _follow(self, region: CacheSlot, start: int) -> bool:
        """Move what a region holds in the KV cache from where it stood; True."""
        if region.start != start:
            length, region.length = region.length, 0  # holds nothing, should the copy be interrupted
            self.copy(start, region.start, length)
            region.length = length
        return True

    def _put_back(self, request: Request) -> None:
        """It waits again, and goes on later where it was."""
        if request.region is not None:
            self.prefix.release(request.region)
            request.region = None
        self.running.remove(request)
        self.waiting.appendleft(request)
