"""How far a mean would move with other pictures: percentile bootstrap (Efron, 1979).

Knows: numbers and which of them belong together. Does not know: what they measure.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from pumice.errors import InputError


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
    numbers: dict[Hashable, int] = {}
    member = [numbers.setdefault(g, len(numbers)) for g in (groups or range(len(values)))]
    sums = np.bincount(member, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(member)
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for number in range(samples):
        drawn = generator.integers(len(sums), size=len(sums))
        means[number] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
