"""The prefix cache decides which request owns which cells of the KV cache, and which of them can be reused.

A cell holds the keys and values of one token. A slot is a row of neighbouring cells that one sequence owns.
Each token has a hash, an integer. Two sequences that begin with the same token hashes have the same KV
entries there, so any request can reuse them.

A finished sequence keeps its slot until its cells are needed. The one that was not used for longest is
evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np


class CacheSlot:
    """Cells `start` to `start + capacity` of the KV cache. The first `length` of them hold tokens.

    token_hashes: (length,) int64. Always 0 <= length <= capacity.
    """

    __slots__ = ("_token_hashes", "capacity", "length", "start")

    def __init__(self, start: int, capacity: int) -> None:
        self.start, self.capacity, self.length = start, capacity, 0
        self._token_hashes = np.empty(capacity, np.int64)

    @property
    def token_hashes(self) -> np.ndarray:
        return self._token_hashes[: self.length]

    def append(self, token_hashes: np.ndarray) -> None:
        """Record tokens that were written to the next cells. Raise ValueError when they do not fit."""
        end = self.length + len(token_hashes)
        if end > self.capacity:
            raise ValueError(
                f"{self.length} + {len(token_hashes)} tokens do not fit in a slot of {self.capacity} cells"
            )
        self._token_hashes[self.length : end] = token_hashes
        self.length = end

    def resize(self, capacity: int) -> None:
        """Change the number of cells. The tokens stay; `capacity` is at least `length`."""
        token_hashes = self.token_hashes
        self.capacity, self._token_hashes = capacity, np.empty(capacity, np.int64)
        self._token_hashes[: self.length] = token_hashes


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Count the token hashes that both sequences begin with."""
    shorter = min(len(first), len(second))
    differences = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differences[0]) if len(differences) else shorter


class PrefixCache:
    """Allocates slots in a KV cache of `capacity` cells.

    keep_finished: whether finished sequences stay, so that later requests can reuse them. Busy slots belong
    to running requests, idle slots to finished ones.
    """

    def __init__(self, capacity: int, *, keep_finished: bool = True) -> None:
        self.capacity, self.keep_finished = capacity, keep_finished
        self.evictions = 0
        self.cached_tokens = 0  # in idle slots
        self.busy: dict[int, CacheSlot] = {}  # by start
        self.idle: OrderedDict[int, CacheSlot] = OrderedDict()  # by start, least recently used first

    def match(self, token_hashes: np.ndarray) -> tuple[CacheSlot | None, int]:
        """Return the slot that shares the longest prefix with `token_hashes`, and the prefix's length."""
        best_slot, best_length = None, 0
        if self.keep_finished:
            for slot in (*self.busy.values(), *self.idle.values()):
                # A slot that is not longer than the best prefix cannot win: skip the comparison.
                if slot.length <= best_length:
                    continue
                length = common_prefix(slot.token_hashes, token_hashes)
                if length > best_length:
                    best_slot, best_length = slot, length
        return best_slot, best_length

    def touch(self, slot: CacheSlot) -> None:
        """Mark an idle slot as used just now, so that it is evicted last."""
        if slot.start in self.idle:
            self.idle.move_to_end(slot.start)

    def allocate(self, capacity: int, spare: CacheSlot | None = None) -> CacheSlot | None:
        """Allocate a slot of `capacity` cells. Evict idle slots, oldest first, but never `spare`.

        Return None, and evict nothing, if there is no room even then.
        """
        evictable = [slot for slot in self.idle.values() if slot is not spare]
        evictable_ids = set(map(id, evictable))
        # Try first as if all were evicted: a request that cannot be placed must not cost anybody's cache.
        if self._find_gap(capacity, (slot for slot in self._all() if id(slot) not in evictable_ids)) is None:
            return None
        for oldest in evictable:
            if self._find_gap(capacity, self._all()) is not None:
                break
            self._evict(oldest)
        start = self._find_gap(capacity, self._all())
        assert start is not None
        slot = self.busy[start] = CacheSlot(start, capacity)
        return slot

    def grow(self, slot: CacheSlot, capacity: int, *, evict: bool = False) -> bool:
        """Widen a busy slot to `capacity` cells. Return False if its neighbours leave no room.

        If the cells behind the slot are too few, it moves down into the gap in front of it. Its `start`
        changes then, and the caller has to copy its tokens in the KV cache. evict: idle neighbours may be
        evicted.
        """
        start = self._find_start(slot, capacity, evict)
        if start is None:
            return False
        del self.busy[slot.start]
        self._place(slot, start, capacity)
        return True

    def reuse(self, slot: CacheSlot, length: int, capacity: int, *, evict: bool = False) -> bool:
        """Make an idle slot busy again, with its first `length` tokens and `capacity` cells.

        It may move, and fail, as in `grow`.
        """
        start = self._find_start(slot, capacity, evict)
        if start is None:
            return False
        del self.idle[slot.start]
        self.cached_tokens -= slot.length
        slot.length = length
        self._place(slot, start, capacity)
        return True

    def release(self, slot: CacheSlot) -> None:
        """Make a busy slot idle: its sequence is finished. Its unused cells become free.

        If one idle sequence is a prefix of another, only the longer one is kept.
        """
        if not (self.keep_finished and slot.length):
            self.free(slot)
            return
        for other in list(self.idle.values()):
            shared = common_prefix(other.token_hashes, slot.token_hashes)
            if shared == slot.length:
                self.free(slot)
                self.touch(other)
                return
            if shared == other.length:
                self.free(other)
        del self.busy[slot.start]
        slot.resize(slot.length)
        self.idle[slot.start] = slot
        self.cached_tokens += slot.length

    def free(self, slot: CacheSlot) -> None:
        """Forget a slot and free its cells. Raise KeyError if it is neither busy nor idle."""
        if self.busy.pop(slot.start, None) is None:
            del self.idle[slot.start]
            self.cached_tokens -= slot.length

    def clear(self) -> None:
        """Free all idle slots. Needed when the model's weights change."""
        for slot in list(self.idle.values()):
            self.free(slot)

    def _all(self) -> list[CacheSlot]:
        return [*self.busy.values(), *self.idle.values()]

    def _evict(self, slot: CacheSlot) -> None:
        self.evictions += 1
        self.free(slot)

    def _place(self, slot: CacheSlot, start: int, capacity: int) -> None:
        slot.start = start
        slot.resize(capacity)
        self.busy[start] = slot

    def _find_gap(self, capacity: int, slots: Iterable[CacheSlot]) -> int | None:
        """Return the start of the smallest gap between `slots` that has `capacity` cells, or None."""
        gaps, end = [], 0
        # The smallest gap that fits, so that large ones stay whole for long prompts.
        for start, size in sorted([(slot.start, slot.capacity) for slot in slots] + [(self.capacity, 0)]):
            if start - end >= capacity:
                gaps.append((start - end, end))
            end = start + size
        return min(gaps)[1] if gaps else None

    def _find_start(self, slot: CacheSlot, capacity: int, evict: bool) -> int | None:
        """Return where `slot` can start when it is `capacity` cells wide. Return None if it does not fit.

        The slot stays between the same two neighbours. evict: idle neighbours are evicted, the oldest first,
        if that makes enough room.
        """
        # 1. Is there room at all? With `evict`, only busy neighbours set the limits.
        low, high = self._gap_around(slot, self.busy.values() if evict else self._all())
        if high - low < capacity:
            return None
        # 2. Evict what lies between these limits, and no more than needed.
        for idle in list(self.idle.values()):
            gap_start, gap_end = self._gap_around(slot, self._all())
            if gap_end - gap_start >= capacity:
                break
            if idle is not slot and low <= idle.start < high:
                self._evict(idle)
        # 3. Stay in place if possible: a move costs a copy in the KV cache.
        low, high = self._gap_around(slot, self._all())
        return slot.start if slot.start + capacity <= high else low

    def _gap_around(self, slot: CacheSlot, others: Iterable[CacheSlot]) -> tuple[int, int]:
        """Return the end of the last of `others` before `slot`, and the start of the first one after it."""
        others = [other for other in others if other is not slot]
        low = max((other.start + other.capacity for other in others if other.start < slot.start), default=0)
        high = min((other.start for other in others if other.start > slot.start), default=self.capacity)
        return low, high
