"""The scheduler decides which requests run, and how many tokens of each the next step computes.

Every step decodes one token of each answer in progress. Prompts share `chunk` tokens per step, first come,
first served, so that a long prompt does not stall the answers. A prompt waits if a running prompt is about to
compute the prefix that both share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pumice.engine.cache import CacheSlot, PrefixCache, common_prefix
from pumice.engine.requests import Request

SLOT_GROWTH = 128  # cells that an answer's slot grows by when it is full
MIN_SHARED_PREFIX = 16  # tokens; a prompt waits for a shared prefix only if it is this long


class Scheduler:
    """Admits, plans and preempts requests.

    slots: requests that may run together; each has one slot of the KV cache. chunk: prompt tokens per step.
    copy_cells(source, target, tokens): copies the contents of cells in the KV cache.
    """

    def __init__(
        self, slots: int, chunk: int, prefix_cache: PrefixCache, copy_cells: Callable[[int, int, int], None]
    ) -> None:
        self.slots, self.chunk = slots, chunk
        self.prefix_cache, self.copy_cells = prefix_cache, copy_cells
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.prompt_tokens = 0  # of all requests admitted so far
        self.prefix_hits = 0  # of `prompt_tokens`, those found in the prefix cache

    def plan(self) -> list[tuple[Request, int]]:
        """Return requests, and how many tokens of each the next step computes. Empty if there is no request.

        Raise RuntimeError if requests wait and none of them can be started.
        """
        # 1. Free the slots that an interrupted plan allocated but gave to no request. Otherwise a request
        #    might never fit again.
        owned = {id(request.slot) for request in self.running}
        for slot in [slot for slot in self.prefix_cache.busy.values() if id(slot) not in owned]:
            self.prefix_cache.free(slot)
        # 2. Admit requests until slots or cells run out.
        self._admit()
        # 3. If a step was interrupted before it chose a token, compute that request's last token again.
        for request in self.running:
            if request.remaining == 0 and request.slot is not None:
                request.slot.length -= 1
        # 4. Give answers whose slot is full more cells. This may preempt requests, so look again at
        #    `running`.
        for request in list(self.running):
            if request in self.running and request.remaining == 1:
                self._ensure_free_cell(request)
        # 5. One token of each answer, then prompt chunks until the budget is used.
        budget = self.chunk
        plan = [(request, 1) for request in self.running if request.remaining == 1]
        for request in self.running:
            if request.remaining > 1 and budget:
                count = min(budget, request.remaining)
                budget -= count
                plan.append((request, count))
        if self.waiting and not plan:
            raise RuntimeError(f"{len(self.waiting)} requests wait, and none of them can be started")
        return plan

    def remove(self, request: Request) -> None:
        """Remove a running or waiting request. Its computed tokens stay in the prefix cache."""
        if request.slot is not None:
            self.prefix_cache.release(request.slot)
            request.slot = None
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _admit(self) -> None:
        """Start waiting requests in order, until one does not fit."""
        for request in list(self.waiting):
            if len(self.running) >= self.slots:
                return
            # The last token is always computed: its hidden state gives the first token of the answer.
            source, shared = self.prefix_cache.match(request.token_hashes[:-1])
            if self._should_wait(request, shared):
                continue
            if not self._start(request, source, shared):
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

    def _start(self, request: Request, source: CacheSlot | None, shared: int) -> bool:
        """Give a request a slot with the first `shared` tokens of `source`. Return False if none fits."""
        capacity = min(request.max_cells, request.length + SLOT_GROWTH)
        # True if the request continues all of an idle sequence, such as the next turn of a conversation.
        continues = source is not None and source.length == shared and source.start in self.prefix_cache.idle
        # 1. Best: reuse the idle slot as it is. Nothing is copied.
        if source is not None and continues and self._reuse(source, shared, capacity):
            slot = source
        # 2. Else allocate a slot and copy the shared tokens, so that `source` can still serve others.
        elif (allocated := self.prefix_cache.allocate(capacity, source)) is not None:
            slot = allocated
            if source is not None:
                self.copy_cells(source.start, slot.start, shared)
                self.prefix_cache.touch(source)
                if continues:
                    self.prefix_cache.free(source)
            slot.append(request.token_hashes[:shared])
        # 3. Else reuse the idle slot and evict its neighbours. The tokens of `source` after the shared ones
        #    are lost, so do this only if there are none, or if nothing runs that could make room later.
        elif source is not None and (continues or not self.running):
            if not self._reuse(source, shared, capacity, evict=True):
                return False
            slot = source
        else:
            return False
        request.slot = slot
        # A preempted request starts again here: count its prompt only once.
        if not request.admitted:
            request.admitted = True
            request.cached_tokens = shared
            self.prefix_hits += shared
            self.prompt_tokens += request.length
        self.running.append(request)
        return True

    def _ensure_free_cell(self, request: Request) -> None:
        """Make room for one more token of an answer. Preempt the newest requests if nothing else helps."""
        slot = request.slot
        if slot is None or slot.length < slot.capacity:
            return
        while not self._enlarge(request, slot, min(request.max_cells, slot.length + SLOT_GROWTH)):
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return

    def _enlarge(self, request: Request, slot: CacheSlot, capacity: int) -> bool:
        """Enlarge a slot to `capacity` cells. Return False only if other running requests leave no room."""
        # Cheapest first: grow in place, then move elsewhere, then evict the neighbours.
        if self._grow(slot, capacity):
            return True
        new_slot = self.prefix_cache.allocate(capacity)
        if new_slot is None:
            return self._grow(slot, capacity, evict=True)
        self.copy_cells(slot.start, new_slot.start, slot.length)
        new_slot.append(slot.token_hashes)
        self.prefix_cache.free(slot)
        request.slot = new_slot
        return True

    def _grow(self, slot: CacheSlot, capacity: int, evict: bool = False) -> bool:
        old_start = slot.start
        if not self.prefix_cache.grow(slot, capacity, evict=evict):
            return False
        self._copy_after_move(slot, old_start)
        return True

    def _reuse(self, slot: CacheSlot, length: int, capacity: int, evict: bool = False) -> bool:
        old_start = slot.start
        if not self.prefix_cache.reuse(slot, length, capacity, evict=evict):
            return False
        self._copy_after_move(slot, old_start)
        return True

    def _copy_after_move(self, slot: CacheSlot, old_start: int) -> None:
        """Copy a slot's tokens in the KV cache to where the slot starts now."""
        if slot.start != old_start:
            # The slot is empty during the copy, so that an interrupted copy leaves no wrong tokens in it.
            length, slot.length = slot.length, 0
            self.copy_cells(old_start, slot.start, length)
            slot.length = length

    def _preempt(self, request: Request) -> None:
        """Stop a running request and put it first in the queue. It continues later from its last token."""
        if request.slot is not None:
            self.prefix_cache.release(request.slot)
            request.slot = None
        self.running.remove(request)
        self.waiting.appendleft(request)
