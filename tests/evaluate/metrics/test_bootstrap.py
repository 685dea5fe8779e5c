"""Bootstrap intervals: where they must lie, and what widens them."""

from __future__ import annotations

import math
import random

import pytest

from pumice.evaluate.metrics.bootstrap import draws, interval_of, mcnemar
from pumice.evaluate.task import mean_statistic


def interval(values: list[float], groups: list[int] | None = None, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean; without groups each value is one."""
    statistic = mean_statistic(values, 1.0)
    return interval_of(statistic, groups or range(len(values)), samples=2000, seed=seed)


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


def test_a_statistic_that_is_never_finite_has_no_interval() -> None:
    assert math.isnan(interval_of(lambda w: math.nan, [0, 0, 1, 1])[0])


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
