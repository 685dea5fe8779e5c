"""Estimate how far a score would change with other images: percentile bootstrap (Efron, 1979) and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]


def interval_of(
    statistic: Callable[[Weights], float],
    groups: Sequence[Hashable],
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return (low, high), the interval of any statistic of weights (how often each value is drawn).

    (nan, nan) where the statistic is never finite.
    """
    values = [statistic(weights) for weights in draws(groups, samples, seed)]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draws(groups: Sequence[Hashable], samples: int, seed: int) -> Iterator[Weights]:
    """Yield the weights of the values in each of `samples` resamples of whole groups."""
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(g, len(numbers)) for g in groups], dtype=np.int64)
    count = len(numbers)
    generator = np.random.default_rng(seed)
    for _ in range(samples if count else 0):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        yield times[member].astype(np.float64)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the two-sided p of McNemar's exact test of two systems that answered the same questions.

    first, second: whether each answer is right.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    total, fewer = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    log_probabilities = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in log_probabilities))
