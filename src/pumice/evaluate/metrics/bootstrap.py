"""How far a number would move with other pictures: percentile bootstrap (Efron, 1979), and paired tests.

Knows: numbers and which of them belong together. Does not know: what they measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pumice.errors import InputError

Weights = NDArray[np.float64]


def interval(
    values: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of the mean of `values`, at `level` confidence; the same seed gives the same interval.

    groups: values of one group (the questions about one picture) are drawn together, since they are
    not independent; each value is a group of its own when None. Raises InputError when there are no
    values, or another number of groups.
    """
    if not len(values) or (groups is not None and len(groups) != len(values)):
        raise InputError(
            f"an interval needs values, and a group for each: {len(values)} values, "
            f"{len(values) if groups is None else len(groups)} groups"
        )
    member = _members(groups if groups else range(len(values)))
    sums = np.bincount(member, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(member)
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for number in range(samples):
        drawn = generator.integers(len(sums), size=len(sums))
        means[number] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_of(
    statistic: Callable[[Weights], float],
    groups: Sequence[Hashable],
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of any statistic of weights: how often each value is drawn. nan where it has no value."""
    found = [statistic(weights) for weights in draws(groups, samples, seed)]
    kept = [value for value in found if math.isfinite(value)]
    if not kept:
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draws(groups: Sequence[Hashable], samples: int, seed: int) -> Iterator[Weights]:
    """Weights of each value in so many resamples of whole groups."""
    member = _members(groups)
    count = int(member.max()) + 1 if len(member) else 0
    generator = np.random.default_rng(seed)
    for _ in range(samples if count else 0):
        times = np.bincount(generator.integers(count, size=count), minlength=count)
        yield times[member].astype(np.float64)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test: two systems on the same questions, right or wrong."""
    one = sum(a and not b for a, b in zip(first, second, strict=True))
    other = sum(b and not a for a, b in zip(first, second, strict=True))
    total, few = one + other, min(one, other)
    if total == 0:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def _members(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(g, len(numbers)) for g in groups], dtype=np.int64)
