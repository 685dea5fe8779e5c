"""Who owns which places of the KV cache, and what stands in them: the prefix cache.

Knows: numbers. A token is known by its key, an integer; tokens with equal keys after equal keys have
equal keys and values in the KV cache, whoever computed them. Does not know: tensors, models, requests.

A finished sequence stays where it is until its places are needed; the one not used for longest goes
first. A new sequence that begins like one that is there, running or finished, copies what they share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np


class CacheSlot:
    """Places `start` to `start + room` of the KV cache, of which the first `length` hold tokens.

    keys (length of them) are those of its tokens; 0 <= length <= room always.
    """

    __slots__ = ("_keys", "length", "room", "start")

    def __init__(self, start: int, room: int) -> None:
        self.start, self.room, self.length = start, room, 0
        self._keys = np.empty(room, np.int64)

    @property
    def keys(self) -> np.ndarray:
        return self._keys[: self.length]

    def append(self, keys: np.ndarray) -> None:
        end = self.length + len(keys)
        if end > self.room:
            raise ValueError(f"{self.length} + {len(keys)} tokens do not fit in a region of {self.room}")
        self._keys[self.length : end] = keys
        self.length = end

    def resize(self, room: int) -> None:
        keys = self.keys
        self.room, self._keys = room, np.empty(room, np.int64)
        self._keys[: self.length] = keys


def common(first: np.ndarray, second: np.ndarray) -> int:
    """How many keys both begin with."""
    least = min(len(first), len(second))
    differ = np.flatnonzero(first[:least] != second[:least])
    return int(differ[0]) if len(differ) else least


class PrefixCache:
    """`capacity` places, given out as regions. keep: whether finished sequences stay to be shared."""

    def __init__(self, capacity: int, *, keep: bool = True) -> None:
        self.capacity, self.keep = capacity, keep
        self.evictions = 0
        self.held = 0  # tokens of finished sequences
        self.busy: dict[int, CacheSlot] = {}  # by start
        self.idle: OrderedDict[int, CacheSlot] = OrderedDict()  # the one not used for longest comes first

    def match(self, keys: np.ndarray) -> tuple[CacheSlot | None, int]:
        """The region that begins most like `keys`, and how many tokens they share."""
        best, shared = None, 0
        if self.keep:
            for region in (*self.busy.values(), *self.idle.values()):
                if region.length > shared and (n := common(region.keys, keys)) > shared:
                    best, shared = region, n
        return best, shared

    def touch(self, region: CacheSlot) -> None:
        """Used just now: the last idle region to be evicted."""
        if region.start in self.idle:
            self.idle.move_to_end(region.start)

    def take(self, room: int, spare: CacheSlot | None = None) -> CacheSlot | None:
        """Allocate `room` places. Evict idle regions, the oldest first, but never `spare`.

        Return None, and evict nothing, if there is no room even so.
        """
        evictable = [region for region in self.idle.values() if region is not spare]
        gone = set(map(id, evictable))
        if self._hole(room, (region for region in self._all() if id(region) not in gone)) is None:
            return None
        for oldest in evictable:
            if self._hole(room, self._all()) is not None:
                break
            self._evict(oldest)
        start = self._hole(room, self._all())
        assert start is not None
        region = self.busy[start] = CacheSlot(start, room)
        return region

    def grow(self, region: CacheSlot, room: int, *, evict: bool = False) -> bool:
        """Widen a running region to `room` places; return False if its neighbours are in the way.

        Where the places behind it are too few, it moves down into the hole in front of it: then its `start`
        changes, and the caller has to copy what stands in the KV cache. evict: idle neighbours give way.
        """
        start = self._reach(region, room, evict)
        if start is None:
            return False
        del self.busy[region.start]
        self._place(region, start, room)
        return True

    def wake(self, region: CacheSlot, length: int, room: int, *, evict: bool = False) -> bool:
        """Go on with the first `length` tokens of an idle region, `room` places wide; else as `grow`."""
        start = self._reach(region, room, evict)
        if start is None:
            return False
        del self.idle[region.start]
        self.held -= region.length
        region.length = length
        self._place(region, start, room)
        return True

    def release(self, region: CacheSlot) -> None:
        """The sequence is finished: it stays as long as there is room, but not in more than it needs.

        Of two of which one is the beginning of the other, only the longer stays.
        """
        if not (self.keep and region.length):
            self.drop(region)
            return
        for other in list(self.idle.values()):
            shared = common(other.keys, region.keys)
            if shared == region.length:
                self.drop(region)
                self.touch(other)
                return
            if shared == other.length:
                self.drop(other)
        del self.busy[region.start]
        region.resize(region.length)
        self.idle[region.start] = region
        self.held += region.length

    def drop(self, region: CacheSlot) -> None:
        """Forget a region and free its places."""
        if self.busy.pop(region.start, None) is None:
            del self.idle[region.start]
            self.held -= region.length

    def clear(self) -> None:
        """Forget every finished sequence: needed when the model's weights change."""
        for region in list(self.idle.values()):
            self.drop(region)

    def _all(self) -> list[CacheSlot]:
        return [*self.busy.values(), *self.idle.values()]

    def _evict(self, region: CacheSlot) -> None:
        self.evictions += 1
        self.drop(region)

    def _place(self, region: CacheSlot, start: int, room: int) -> None:
        region.start = start
        region.resize(room)
        self.busy[start] = region

    def _hole(self, room: int, owners: Iterable[CacheSlot]) -> int | None:
        """The start of the smallest hole between `owners` that has `room` places."""
        holes, end = [], 0
        for start, size in sorted([(region.start, region.room) for region in owners] + [(self.capacity, 0)]):
            if start - end >= room:
                holes.append((start - end, end))
            end = start + size
        return min(holes)[1] if holes else None

    def _reach(self, region: CacheSlot, room: int, evict: bool) -> int | None:
        """Where a region can start that becomes `room` places wide and passes no neighbour; None if nowhere.

        evict: idle neighbours are evicted, the oldest first, if that makes enough room.
        """
        low, high = self._between(region, self.busy.values() if evict else self._all())
        if high - low < room:
            return None
        for idle in list(self.idle.values()):
            first, last = self._between(region, self._all())
            if last - first >= room:
                break
            if idle is not region and low <= idle.start < high:
                self._evict(idle)
        low, high = self._between(region, self._all())
        return region.start if region.start + room <= high else low

    def _between(self, region: CacheSlot, others: Iterable[CacheSlot]) -> tuple[int, int]:
        """The end of the last of `others` before a region, and the start of the first after it."""
        others = [other for other in others if other is not region]
        low = max((other.start + other.room for other in others if other.start < region.start), default=0)
        high = min((other.start for other in others if other.start > region.start), default=self.capacity)
        return low, high
