"""Bootstrap intervals: where they must lie, and what widens them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from pumice.errors import InputError
from pumice.evaluate.metrics.bootstrap import draws, interval, interval_of, mcnemar


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


def test_an_interval_of_any_statistic_is_that_of_the_mean() -> None:
    values = np.array([0.0, 1, 1, 0, 1, 0, 0, 1])
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    mean = interval_of(lambda w: float((w * values).sum() / w.sum()), groups, samples=2000)
    assert mean == pytest.approx(interval(values.tolist(), groups), abs=0.05)  # measured: equal
    assert math.isnan(interval_of(lambda w: math.nan, groups)[0])


def test_draws_take_whole_groups() -> None:
    for weights in draws(["a", "b", "a", "c"], 50, 0):
        assert weights[0] == weights[2]
        assert weights[0] + weights[1] + weights[3] == 3


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 0, 2 / 32), (6, 2, 2 * 37 / 256), (3, 3, 1.0)]
)
def test_mcnemar_by_hand(better: int, worse: int, p: float) -> None:
    # (6, 2): two-sided, 2 * (1 + 8 + 28) / 2**8.
    first = [False] * better + [True] * worse + [True, False]
    second = [True] * better + [False] * worse + [True, False]
    assert mcnemar(first, second) == pytest.approx(p)
