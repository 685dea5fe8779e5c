"""Items are worked on in processes as in one, and one that crashes its process costs no other its result."""

from __future__ import annotations

import samples

from pumice.data.processes import map_parts


def test_an_item_that_crashes_its_process_is_found_and_the_others_are_done() -> None:
    parts = [[0, 1], [2, 3], [4], [5, samples.CRASHES], [6, 7], [8, samples.CRASHES]]
    done = list(map_parts(samples.double, parts, 2, lambda number: -number))
    assert done == [[0, 2], [4, 6], [8], [10, -samples.CRASHES], [12, 14], [16, -samples.CRASHES]]


def test_no_process_is_started_for_none() -> None:
    seen: list[int] = []
    parts = [[1, 2], [3]]
    assert list(map_parts(lambda part: seen.extend(part) or [0] * len(part), parts, 0, abs)) == [[0, 0], [0]]
    assert seen == [1, 2, 3]
