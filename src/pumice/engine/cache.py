"""Who owns which places of the KV cache, and what stands in them: the prefix cache.

Knows: numbers. A token is known by its key, an integer; tokens with equal keys after equal keys have
equal keys and values in the KV cache, whoever computed them. Does not know: tensors, models, requests.

A finished sequence stays where it is until its places are needed; the one not used for longest goes
first. A new sequence that begins like one that is there, running or finished, copies what they share.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


class Region:
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
        self.busy: dict[int, Region] = {}  # by start
        self.idle: OrderedDict[int, Region] = OrderedDict()  # the one not used for longest comes first
        self._holes: list[tuple[int, int]] = [(0, capacity)] if capacity else []  # (start, size), by start

    def match(self, keys: np.ndarray) -> tuple[Region | None, int]:
        """The region that begins most like `keys`, and how many tokens they share."""
        best, shared = None, 0
        if self.keep:
            for region in (*self.busy.values(), *self.idle.values()):
                if region.length > shared and (n := common(region.keys, keys)) > shared:
                    best, shared = region, n
        return best, shared

    def touch(self, region: Region) -> None:
        """Used just now: the last idle region to be evicted."""
        if region.start in self.idle:
            self.idle.move_to_end(region.start)

    def take(self, room: int, spare: Region | None = None) -> Region | None:
        """A region of so many places, idle regions but `spare` evicted for it as needed; None if in vain."""
        while (start := self._fit(room)) is None:
            oldest = next((region for region in self.idle.values() if region is not spare), None)
            if oldest is None:
                return None
            self.evictions += 1
            self.drop(oldest)
        region = self.busy[start] = Region(start, room)
        return region

    def grow(self, region: Region, room: int) -> bool:
        """Widen a region to `room` places where it stands; False when its neighbour is in the way."""
        end, more = region.start + region.room, room - region.room
        for number, (start, size) in enumerate(self._holes):
            if start == end and size >= more:
                self._holes[number : number + 1] = [(start + more, size - more)] if size > more else []
                region.resize(room)
                return True
        return False

    def wake(self, region: Region, room: int) -> bool:
        """Go on with an idle region where it stands, `room` places wide; False as of `grow`."""
        if room > region.room and not self.grow(region, room):
            return False
        del self.idle[region.start]
        self.held -= region.length
        self.busy[region.start] = region
        return True

    def release(self, region: Region) -> None:
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
        self._free(region.start + region.length, region.room - region.length)
        region.resize(region.length)
        self.idle[region.start] = region
        self.held += region.length

    def drop(self, region: Region) -> None:
        """Forget a region and free its places."""
        if self.busy.pop(region.start, None) is None:
            del self.idle[region.start]
            self.held -= region.length
        self._free(region.start, region.room)

    def clear(self) -> None:
        """Forget every finished sequence: needed when the model's weights change."""
        for region in list(self.idle.values()):
            self.drop(region)

    def _fit(self, room: int) -> int | None:
        """The start of `room` places cut from the smallest hole that has them."""
        fitting = [(size, number) for number, (_, size) in enumerate(self._holes) if size >= room]
        if not fitting:
            return None
        size, number = min(fitting)
        start = self._holes[number][0]
        self._holes[number : number + 1] = [(start + room, size - room)] if size > room else []
        return start

    def _free(self, start: int, size: int) -> None:
        if not size:
            return
        holes = sorted([*self._holes, (start, size)])
        joined = holes[:1]
        for place, width in holes[1:]:
            before, size = joined[-1]
            if before + size > place:
                raise ValueError(f"place {place} is freed twice")
            if before + size == place:
                joined[-1] = (before, size + width)
            else:
                joined.append((place, width))
        self._holes = joined
