"""Cells have one owner, the longest shared prefix is found, the oldest idle slot is evicted first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.engine.cache import CacheSlot, PrefixCache, common_prefix


def hashes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def filled(cache: PrefixCache, *values: int, capacity: int = 0) -> CacheSlot:
    slot = cache.allocate(max(capacity, len(values)))
    assert slot is not None
    slot.append(hashes(*values))
    return slot


def test_common_prefix() -> None:
    assert common_prefix(hashes(1, 2, 3), hashes(1, 2, 4, 5)) == 2
    assert common_prefix(hashes(1, 2), hashes(1, 2, 3)) == 2
    assert common_prefix(hashes(), hashes(1)) == common_prefix(hashes(1), hashes(2)) == 0


def test_match_finds_the_longest_prefix_among_running_and_finished() -> None:
    cache = PrefixCache(20)
    running = filled(cache, 1, 2, 9, capacity=6)
    finished = filled(cache, 1, 2, 3, 4)
    cache.release(finished)
    assert cache.match(hashes(1, 2, 3, 7)) == (finished, 3)
    assert cache.match(hashes(1, 2, 9, 9)) == (running, 3)
    assert cache.match(hashes(5)) == (None, 0)
    assert cache.cached_tokens == 4


def test_the_least_recently_used_slot_is_evicted_first() -> None:
    cache = PrefixCache(12)
    first, second, third = (filled(cache, n, n, n, n) for n in (1, 2, 3))
    for slot in (first, second, third):
        cache.release(slot)
    cache.touch(first)
    assert cache.allocate(4) is not None
    assert (cache.match(hashes(2))[1], cache.evictions, cache.cached_tokens) == (0, 1, 8)
    assert cache.allocate(4, spare=third) is not None
    assert [cache.match(hashes(n))[1] for n in (1, 3)] == [0, 1]
    assert cache.allocate(4, spare=third) is None
    assert cache.match(hashes(3))[1] == 1


def test_of_a_sequence_and_its_prefix_the_longer_stays() -> None:
    cache = PrefixCache(20)
    short, long, again = filled(cache, 1, 2), filled(cache, 1, 2, 3), filled(cache, 1, 2, 3)
    for slot in (short, long, again):
        cache.release(slot)
    assert (cache.cached_tokens, len(cache.idle)) == (3, 1)


def test_without_keep_finished_nothing_stays() -> None:
    cache = PrefixCache(8, keep_finished=False)
    cache.release(filled(cache, 1, 2, 3))
    assert (cache.cached_tokens, cache.match(hashes(1, 2))) == (0, (None, 0))
    assert cache.allocate(8) is not None


def test_a_slot_grows_into_the_gap_behind_it() -> None:
    cache = PrefixCache(10)
    first = filled(cache, 1, 2, 3)
    second = filled(cache, 4)
    assert not cache.grow(first, 5)
    assert cache.grow(second, 7)
    assert not cache.grow(second, 8)
    assert (second.token_hashes.tolist(), second.capacity) == ([4], 7)
    cache.free(second)
    assert cache.grow(first, 10)


def test_a_slot_moves_down_into_the_gap_in_front_of_it() -> None:
    cache = PrefixCache(10)
    first, second = filled(cache, 1, 2, 3), filled(cache, 4, 5)
    assert not cache.grow(second, 8)
    cache.free(first)
    assert cache.grow(second, 7)
    assert (second.start, second.capacity) == (3, 7)  # in place, as long as there is room
    assert cache.grow(second, 8)
    assert (second.start, second.capacity, second.token_hashes.tolist()) == (0, 8, [4, 5])
    assert list(cache.busy) == [0]


def test_idle_neighbours_are_evicted_for_a_slot_that_grows_the_oldest_first() -> None:
    cache = PrefixCache(12)
    first, second, third, fourth = (filled(cache, n, n, n) for n in (1, 2, 3, 4))
    for slot in (third, first):
        cache.release(slot)
    assert not cache.grow(second, 6)
    assert not cache.grow(second, 10, evict=True)  # the fourth runs, so evicting would not help
    assert (cache.evictions, cache.cached_tokens) == (0, 6)
    assert cache.grow(second, 6, evict=True)
    assert (list(cache.idle.values()), second.start, cache.cached_tokens) == ([first], 3, 3)
    assert cache.grow(second, 9, evict=True)
    assert (cache.idle, second.start, fourth.start) == ({}, 0, 9)


def test_a_slot_that_grows_evicts_nothing_beyond_its_busy_neighbours() -> None:
    cache = PrefixCache(18)
    first, _, slot, neighbour, _, last = (filled(cache, n, n, n) for n in range(6))
    for idle in (first, last, neighbour):  # the neighbour is the newest
        cache.release(idle)
    assert cache.grow(slot, 6, evict=True)
    assert (list(cache.idle.values()), cache.evictions) == ([first, last], 1)


def test_an_idle_slot_is_reused_with_a_part_of_its_tokens() -> None:
    cache = PrefixCache(10)
    first, second = filled(cache, 1, 2, 3, 4), filled(cache, 5, 6, 7)
    for slot in (first, second):
        cache.release(slot)
    assert cache.reuse(second, 2, 9, evict=True)
    assert (second.start, second.token_hashes.tolist(), cache.cached_tokens, cache.evictions) == (
        0,
        [5, 6],
        0,
        1,
    )


def test_allocate_evicts_nothing_if_there_is_no_room() -> None:
    cache = PrefixCache(12)
    first, _ = filled(cache, 1, 1, 1, 1), filled(cache, 2, 2, 2, 2)
    cache.release(first)
    assert cache.allocate(5) is None
    assert (list(cache.idle.values()), cache.evictions) == ([first], 0)


def test_an_idle_slot_is_reused_in_place() -> None:
    cache = PrefixCache(10)
    first = filled(cache, 1, 2, 3)
    cache.release(first)
    assert cache.reuse(first, 3, 6)
    assert (first.token_hashes.tolist(), first.capacity, cache.cached_tokens, dict(cache.idle)) == (
        [1, 2, 3],
        6,
        0,
        {},
    )
    second = filled(cache, 4)
    cache.release(first)
    assert not cache.reuse(first, 3, 7)  # the second slot lies behind it
    assert (list(cache.idle.values()), cache.cached_tokens) == ([first], 3)
    cache.free(second)
    assert cache.reuse(first, 3, 10)


def test_wrong_calls_raise() -> None:
    cache = PrefixCache(4)
    slot = filled(cache, 1, 2, capacity=3)
    with pytest.raises(ValueError, match="2 \\+ 2 tokens do not fit in a slot of 3 cells"):
        slot.append(hashes(1, 2))
    cache.free(slot)
    with pytest.raises(KeyError):
        cache.free(slot)


STEPS = st.tuples(st.sampled_from(["allocate", "release", "free", "grow", "reuse"]), st.integers(1, 9))


@given(st.lists(STEPS, max_size=60))
def test_every_cell_has_one_owner(steps: list[tuple[str, int]]) -> None:
    cache, running, number = PrefixCache(24), list[CacheSlot](), 0
    for action, size in steps:
        if action == "allocate":
            number += 1
            if (slot := cache.allocate(size)) is not None:
                slot.append(np.full(size - size // 2, number))
                running.append(slot)
            else:
                free = np.ones(24, int)
                for slot in running:
                    free[slot.start : slot.start + slot.capacity] = 0
                assert "1" * size not in "".join(map(str, free))  # even with all idle slots evicted
        elif action == "reuse":
            for slot in list(cache.idle.values())[-1:]:
                if cache.reuse(slot, slot.length, max(slot.length, size)):
                    running.append(slot)
        elif running:
            slot = running[size % len(running)]
            if action == "grow":
                cache.grow(slot, slot.capacity + size, evict=size % 2 == 0)
            else:
                running.remove(slot)
                (cache.release if action == "release" else cache.free)(slot)
        owned = np.zeros(24, int)
        for slot in (*cache.busy.values(), *cache.idle.values()):
            assert 0 <= slot.length <= slot.capacity
            owned[slot.start : slot.start + slot.capacity] += 1
        assert owned.max() <= 1
        assert list(cache.busy.values()) == running or set(cache.busy.values()) == set(running)
        assert cache.cached_tokens == sum(slot.length for slot in cache.idle.values())
