"""Blocks are shared by what begins alike, found without a search, and evicted in the order of their use."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.engine.cache import CacheSlot, PrefixCache, common_prefix


def hashes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class Cells:
    """A KV cache that holds, for each token, the sequence up to it."""

    def __init__(self, blocks: int, block: int, **options: bool) -> None:
        self.block = block
        self.cells: list[tuple[int, ...]] = [()] * (blocks * block)
        self.copied: list[int] = []
        self.cache = PrefixCache(blocks, block, self.copy, **options)

    def copy(self, source: int, target: int, count: int) -> None:
        self.copied.append(count)
        for n in range(count):
            self.cells[target * self.block + n] = self.cells[source * self.block + n]

    def start(self, *values: int, capacity: int = 0) -> CacheSlot | None:
        """Open a slot for tokens, and write those that were not found."""
        tokens = hashes(*values)
        match = self.cache.match(tokens)
        slot = self.cache.open(tokens, match, max(capacity, len(values)))
        if slot is not None:
            assert self.held(slot) == list(values[: slot.length])
            self.write(slot, *values)
        return slot

    def opened(self, *values: int, capacity: int = 0) -> CacheSlot:
        slot = self.start(*values, capacity=capacity)
        assert slot is not None
        return slot

    def write(self, slot: CacheSlot, *values: int) -> None:
        for n in range(slot.length, len(values)):
            self.cells[slot.table[n // self.block] * self.block + n % self.block] = values[: n + 1]
        self.cache.record(slot, hashes(*values))

    def held(self, slot: CacheSlot) -> list[int]:
        """The tokens of a slot. Each cell must have been written after the same tokens."""
        found = [
            self.cells[slot.table[n // self.block] * self.block + n % self.block] for n in range(slot.length)
        ]
        tokens = [cell[-1] for cell in found]
        assert found == [tuple(tokens[: n + 1]) for n in range(len(tokens))]
        return tokens

    def check(self, slots: list[CacheSlot]) -> None:
        """Each block counts its owners, and is busy, idle or free."""
        cache = self.cache
        owners = Counter(block.number for slot in slots for block in slot.blocks)
        assert owners == {number: block.owners for number, block in cache.busy.items()}
        assert sorted([*cache.busy, *cache.idle, *cache._free]) == list(range(cache.blocks))
        assert cache.cached_tokens == sum(block.length for block in cache.idle.values())
        for slot in slots:
            self.held(slot)


def test_common_prefix() -> None:
    assert common_prefix(hashes(1, 2, 3), hashes(1, 2, 4, 5)) == 2
    assert common_prefix(hashes(1, 2), hashes(1, 2, 3)) == 2
    assert common_prefix(hashes(), hashes(1)) == common_prefix(hashes(1), hashes(2)) == 0


def test_match_finds_the_longest_prefix_among_running_and_finished() -> None:
    cells = Cells(10, 2)
    running, finished = cells.opened(1, 2, 9), cells.opened(1, 2, 3, 4, 5)
    cells.cache.release(finished)
    assert cells.cache.match(hashes(1, 2, 3, 7)).length == 3
    assert cells.cache.match(hashes(1, 2, 3, 4, 5, 6)).length == 5
    assert cells.cache.match(hashes(1, 2, 9, 9)).tail is running.blocks[1]
    assert cells.cache.match(hashes(5)) == ([], None, 0)
    assert cells.cache.cached_tokens == 3  # the block of 1 and 2 has an owner


def test_running_requests_share_full_blocks_and_copy_the_rest() -> None:
    cells = Cells(10, 4)
    first = cells.opened(*range(11), capacity=16)
    second = cells.opened(*range(10), 77, 78)
    assert second.blocks[:2] == first.blocks[:2]
    assert [block.owners for block in second.blocks] == [2, 2, 1]
    assert cells.copied == [2]
    assert (cells.held(first), cells.held(second)) == ([*range(11)], [*range(10), 77, 78])
    cells.check([first, second])


def test_an_idle_sequence_continues_in_its_own_blocks() -> None:
    cells = Cells(10, 4)
    first = cells.opened(*range(6))
    cells.cache.release(first)
    second = cells.opened(*range(6), 50, 51, 52)
    assert (second.blocks[:2], cells.copied) == (first.blocks, [])
    cells.cache.release(second)
    third = cells.opened(*range(5), 60)  # only a part of the block: the rest stays for others
    assert (cells.copied, cells.cache.match(hashes(*range(6), 50, 51, 52)).length) == ([1], 9)
    cells.check([third])


def test_two_that_compute_the_same_share_it_afterwards() -> None:
    cells = Cells(10, 2)
    first, second = cells.opened(1, capacity=6), cells.opened(1, capacity=6)
    for values in ((1, 2), (1, 2, 3), (1, 2, 3, 4)):
        cells.write(first, *values)
        cells.write(second, *values)
        cells.check([first, second])
    assert second.blocks[:2] == first.blocks[:2]
    cells.write(second, 1, 2, 3, 4, 5)
    cells.check([first, second])


def test_what_was_not_used_for_longest_is_evicted_first_and_ends_before_beginnings() -> None:
    cells = Cells(6, 2)
    for first in (1, 2, 3):
        cells.cache.release(cells.opened(first, 0, 0, 0))
    cells.cache.release(cells.opened(1, 0, 0, 0))
    slot = cells.opened(9, 9, 9)
    lengths = [cells.cache.match(hashes(n, 0, 0, 0)).length for n in (1, 2, 3)]
    assert (lengths, cells.cache.evictions, cells.cache.cached_tokens) == ([4, 0, 4], 2, 8)
    assert cells.cache.grow(slot, 5)
    assert [cells.cache.match(hashes(n, 0, 0, 0)).length for n in (1, 2, 3)] == [4, 0, 2]


def test_of_a_sequence_and_its_prefix_the_longer_stays() -> None:
    cells = Cells(10, 4)
    slots = [cells.opened(1, 2), cells.opened(1, 2, 3), cells.opened(1, 2, 3)]
    for slot in slots:
        cells.cache.release(slot)
    assert (cells.cache.cached_tokens, len(cells.cache.idle)) == (3, 1)


def test_without_keep_finished_nothing_is_shared_and_nothing_stays() -> None:
    cells = Cells(4, 2, keep_finished=False)
    first = cells.opened(1, 2, 3)
    assert cells.cache.match(hashes(1, 2)) == ([], None, 0)
    cells.check([first])
    cells.cache.release(first)
    assert (cells.cache.cached_tokens, len(cells.cache._free)) == (0, 4)


def test_what_does_not_fit_evicts_nothing() -> None:
    cells = Cells(4, 2)
    cells.cache.release(cells.opened(1, 1, 1))
    running = cells.opened(2, 2, 2)
    assert cells.start(3, 3, 3, 3, 3) is None
    assert cells.start(1, 1, 1, 1, 1, 1, 1) is None
    assert (cells.cache.evictions, cells.cache.match(hashes(1, 1, 1)).length) == (0, 3)
    assert cells.cache.grow(running, 100)  # as far as there is room
    assert (len(running.blocks), cells.cache.grow(running, 100)) == (4, False)
    cells.check([running])


def test_a_tail_gives_way_where_there_is_no_room_to_copy_it() -> None:
    cells = Cells(2, 4)
    cells.cache.release(cells.opened(*range(7)))
    slot = cells.opened(*range(6), 9)
    assert (cells.copied, cells.held(slot)) == ([], [*range(6), 9])


def test_blocks_without_memory_are_not_given_out() -> None:
    cells = Cells(6, 2)
    memory = [True]
    cells.cache.has_memory = lambda: memory[0]
    first, second = cells.opened(1, 1, 1), cells.opened(2, 2, 2)
    memory[0] = False
    cells.cache.release(first)
    assert cells.cache.available == 2
    assert cells.start(3, 3, 3, 3, 3) is None
    third = cells.opened(3, 3, 3)  # in what has been used before
    assert (cells.cache.evictions, max(third.table)) == (2, 1)
    assert not cells.cache.grow(second, 5)
    memory[0] = True
    assert cells.cache.grow(second, 5)
    cells.check([second, third])


def test_after_an_interruption_ends_are_evicted_before_beginnings_too() -> None:
    cells = Cells(3, 2)
    cells.opened(1, 2, 3, 4)
    cells.cache.recover([])
    cells.opened(9, 9, 9)
    assert cells.cache.match(hashes(1, 2, 3, 4)).length == 2


def test_what_is_hidden_is_found_by_nobody_and_free_afterwards() -> None:
    cells = Cells(6, 2)
    first, second = cells.opened(1, 2, 3, capacity=6), cells.opened(1, 2, 4)
    cells.cache.hide(first)
    assert cells.cache.match(hashes(1, 2, 3)).length == 0
    cells.write(first, 1, 2, 3, 4, 5)
    cells.write(second, 1, 2, 4, 5)
    cells.check([first, second])
    cells.cache.release(first)
    cells.cache.release(second)
    cells.check([])
    again = cells.opened(1, 2, 3, 4, 5)
    assert cells.cache.match(hashes(1, 2, 3, 4, 5)).length == 5
    cells.check([again])


def test_clear_forgets_what_is_idle() -> None:
    cells = Cells(6, 2)
    cells.cache.release(cells.opened(1, 2, 3))
    cells.cache.clear()
    assert (cells.cache.match(hashes(1, 2, 3)).length, cells.cache.cached_tokens) == (0, 0)
    assert cells.cache.evictions == 0


def test_wrong_calls_raise() -> None:
    cells = Cells(4, 2)
    slot = cells.opened(1, 2, 3)
    with pytest.raises(ValueError, match="5 tokens do not fit in 2 blocks of 2 cells"):
        cells.cache.record(slot, hashes(1, 2, 3, 4, 5))


def test_finding_a_prefix_does_not_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that differ at once, and those that differ in the middle of a block: a few comparisons."""
    cells = Cells(4000, 4)
    for n in range(1000):
        cells.cache.release(cells.opened(n, 0, 0, 0, 0))
        cells.cache.release(cells.opened(5000, 5000, n, 0, 0))
    calls = 0
    compare = common_prefix

    def counted(first: np.ndarray, second: np.ndarray) -> int:
        nonlocal calls
        calls += 1
        return compare(first, second)

    monkeypatch.setattr("pumice.engine.cache.common_prefix", counted)
    assert cells.cache.match(hashes(5000, 5000, 700, 0, 0, 0)).length == 5
    assert cells.cache.match(hashes(5000, 5000, 700, 1)).length == 3
    assert cells.cache.match(hashes(700, 0, 1)).length == 2
    assert cells.cache.match(hashes(-1)).length == 0
    assert calls <= 8


STEPS = st.tuples(
    st.sampled_from(["start", "start", "write", "grow", "release", "recover"]),
    st.integers(0, 8),
    st.lists(st.integers(0, 1), max_size=9),
)


@given(st.integers(1, 4), st.lists(STEPS, max_size=60))
def test_every_block_counts_its_owners_and_holds_their_tokens(
    block: int, steps: list[tuple[str, int, list[int]]]
) -> None:
    cells = Cells(10, block)
    running: list[tuple[CacheSlot, list[int]]] = []
    for action, number, values in steps:
        if action == "start" and values:
            slot = cells.start(*values, capacity=len(values) + number % 3)
            if slot is not None:
                running.append((slot, values))
        elif running:
            slot, tokens = running[number % len(running)]
            if action == "write" and slot.length < len(slot.blocks) * block:
                tokens.append(number % 2)
                cells.write(slot, *tokens)
            elif action == "grow":
                cells.cache.grow(slot, len(slot.blocks) * block + number + 1)
            elif action == "release":
                running.remove((slot, tokens))
                cells.cache.release(slot)
            elif action == "recover":  # as after an interruption that lost a slot
                running.remove((slot, tokens))
                cells.cache.recover([slot for slot, _ in running])
        cells.check([slot for slot, _ in running])
        for slot, tokens in running:
            assert cells.held(slot) == tokens
