"""Bootstrap intervals: where they must lie, and what widens them."""

from __future__ import annotations

import math
import random

import pytest

from pumice.errors import InputError
from pumice.evaluate.bootstrap import interval


def test_width_is_that_of_the_normal_approximation() -> None:
    draw = random.Random(0)
    values = [float(draw.random() < 0.8) for _ in range(1000)]
    mean = sum(values) / 1000
    low, high = interval(values)
    error = 1.96 * math.sqrt(mean * (1 - mean) / 1000)
    assert low == pytest.approx(mean - error, abs=0.004)
    assert high == pytest.approx(mean + error, abs=0.004)


def test_values_that_move_together_widen_it() -> None:
    """Ten copies of each of 50 values are worth 50 values, not 500."""
    draw = random.Random(0)
    singles = [draw.random() for _ in range(50)]
    copies = [value for value in singles for _ in range(10)]
    groups = [number for number in range(50) for _ in range(10)]
    assert interval(copies, groups) == pytest.approx(interval(singles))
    low, high = interval(copies)
    wide_low, wide_high = interval(copies, groups)
    assert wide_high - wide_low > 2.5 * (high - low)


def test_constant_values_leave_no_doubt_and_seeds_repeat() -> None:
    assert interval([0.5] * 7) == (0.5, 0.5)
    assert interval([0, 1, 1, 0, 1], seed=3) == interval([0, 1, 1, 0, 1], seed=3)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="0 values"):
        interval([])
    with pytest.raises(InputError, match="2 values, 1 groups"):
        interval([1, 2], ["a"])
