"""Places of the cache: each given out once, none lost, shared beginnings found, the oldest evicted first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.engine.cache import CacheSlot, PrefixCache, common


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def filled(cache: PrefixCache, *values: int, room: int = 0) -> CacheSlot:
    region = cache.take(max(room, len(values)))
    assert region is not None
    region.append(keys(*values))
    return region


def test_common() -> None:
    assert common(keys(1, 2, 3), keys(1, 2, 4, 5)) == 2
    assert common(keys(1, 2), keys(1, 2, 3)) == 2
    assert common(keys(), keys(1)) == common(keys(1), keys(2)) == 0


def test_the_longest_shared_beginning_is_found_among_running_and_finished() -> None:
    cache = PrefixCache(20)
    running = filled(cache, 1, 2, 9, room=6)
    finished = filled(cache, 1, 2, 3, 4)
    cache.release(finished)
    assert cache.match(keys(1, 2, 3, 7)) == (finished, 3)
    assert cache.match(keys(1, 2, 9, 9)) == (running, 3)
    assert cache.match(keys(5)) == (None, 0)
    assert cache.held == 4


def test_the_one_not_used_for_longest_is_evicted_first() -> None:
    cache = PrefixCache(12)
    first, second, third = (filled(cache, n, n, n, n) for n in (1, 2, 3))
    for region in (first, second, third):
        cache.release(region)
    cache.touch(first)
    assert cache.take(4) is not None
    assert (cache.match(keys(2))[1], cache.evictions, cache.held) == (0, 1, 8)
    assert cache.take(4, spare=third) is not None
    assert [cache.match(keys(n))[1] for n in (1, 3)] == [0, 1]
    assert cache.take(4, spare=third) is None
    assert cache.match(keys(3))[1] == 1


def test_of_two_the_longer_stays() -> None:
    cache = PrefixCache(20)
    short, long, again = filled(cache, 1, 2), filled(cache, 1, 2, 3), filled(cache, 1, 2, 3)
    for region in (short, long, again):
        cache.release(region)
    assert (cache.held, len(cache.idle)) == (3, 1)


def test_nothing_is_kept_where_that_is_not_wanted() -> None:
    cache = PrefixCache(8, keep=False)
    cache.release(filled(cache, 1, 2, 3))
    assert (cache.held, cache.match(keys(1, 2))) == (0, (None, 0))
    assert cache.take(8) is not None


def test_a_region_grows_into_the_hole_behind_it() -> None:
    cache = PrefixCache(10)
    first = filled(cache, 1, 2, 3)
    second = filled(cache, 4)
    assert not cache.grow(first, 5)
    assert cache.grow(second, 7)
    assert not cache.grow(second, 8)
    assert (second.keys.tolist(), second.room) == ([4], 7)
    cache.drop(second)
    assert cache.grow(first, 10)


def test_a_region_moves_down_into_the_hole_in_front_of_it() -> None:
    cache = PrefixCache(10)
    first, second = filled(cache, 1, 2, 3), filled(cache, 4, 5)
    assert not cache.grow(second, 8)
    cache.drop(first)
    assert cache.grow(second, 7)
    assert (second.start, second.room) == (3, 7)  # where it stands, as long as that does
    assert cache.grow(second, 8)
    assert (second.start, second.room, second.keys.tolist()) == (0, 8, [4, 5])
    assert list(cache.busy) == [0]


def test_idle_neighbours_give_way_to_a_region_that_grows_the_oldest_first() -> None:
    cache = PrefixCache(12)
    first, second, third, fourth = (filled(cache, n, n, n) for n in (1, 2, 3, 4))
    for region in (third, first):
        cache.release(region)
    assert not cache.grow(second, 6)
    assert not cache.grow(second, 10, evict=True)  # the fourth runs: nobody goes in vain
    assert (cache.evictions, cache.held) == (0, 6)
    assert cache.grow(second, 6, evict=True)
    assert (list(cache.idle.values()), second.start, cache.held) == ([first], 3, 3)
    assert cache.grow(second, 9, evict=True)
    assert (cache.idle, second.start, fourth.start) == ({}, 0, 9)


def test_an_idle_region_wakes_with_a_part_of_what_it_holds() -> None:
    cache = PrefixCache(10)
    first, second = filled(cache, 1, 2, 3, 4), filled(cache, 5, 6, 7)
    for region in (first, second):
        cache.release(region)
    assert cache.wake(second, 2, 9, evict=True)
    assert (second.start, second.keys.tolist(), cache.held, cache.evictions) == (0, [5, 6], 0, 1)


def test_what_finds_no_room_evicts_nothing() -> None:
    cache = PrefixCache(12)
    first, _ = filled(cache, 1, 1, 1, 1), filled(cache, 2, 2, 2, 2)
    cache.release(first)
    assert cache.take(5) is None
    assert (list(cache.idle.values()), cache.evictions) == ([first], 0)


def test_an_idle_region_goes_on_where_it_stands() -> None:
    cache = PrefixCache(10)
    first = filled(cache, 1, 2, 3)
    cache.release(first)
    assert cache.wake(first, 3, 6)
    assert (first.keys.tolist(), first.room, cache.held, dict(cache.idle)) == ([1, 2, 3], 6, 0, {})
    second = filled(cache, 4)
    cache.release(first)
    assert not cache.wake(first, 3, 7)  # the other stands behind it
    assert (list(cache.idle.values()), cache.held) == ([first], 3)
    cache.drop(second)
    assert cache.wake(first, 3, 10)


def test_what_cannot_be_is_an_error() -> None:
    cache = PrefixCache(4)
    region = filled(cache, 1, 2, room=3)
    with pytest.raises(ValueError, match="2 \\+ 2 tokens do not fit in a region of 3"):
        region.append(keys(1, 2))
    cache.drop(region)
    with pytest.raises(KeyError):
        cache.drop(region)


STEPS = st.tuples(st.sampled_from(["take", "release", "drop", "grow", "wake"]), st.integers(1, 9))


@given(st.lists(STEPS, max_size=60))
def test_every_place_has_one_owner(steps: list[tuple[str, int]]) -> None:
    cache, running, number = PrefixCache(24), list[CacheSlot](), 0
    for what, size in steps:
        if what == "take":
            number += 1
            if (region := cache.take(size)) is not None:
                region.append(np.full(size - size // 2, number))
                running.append(region)
            else:
                free = np.ones(24, int)
                for region in running:
                    free[region.start : region.start + region.room] = 0
                assert "1" * size not in "".join(map(str, free))  # whatever is evicted
        elif what == "wake":
            for region in list(cache.idle.values())[-1:]:
                if cache.wake(region, region.length, max(region.length, size)):
                    running.append(region)
        elif running:
            region = running[size % len(running)]
            if what == "grow":
                cache.grow(region, region.room + size, evict=size % 2 == 0)
            else:
                running.remove(region)
                (cache.release if what == "release" else cache.drop)(region)
        owned = np.zeros(24, int)
        for region in (*cache.busy.values(), *cache.idle.values()):
            assert 0 <= region.length <= region.room
            owned[region.start : region.start + region.room] += 1
        assert owned.max() <= 1
        assert list(cache.busy.values()) == running or set(cache.busy.values()) == set(running)
        assert cache.held == sum(region.length for region in cache.idle.values())
