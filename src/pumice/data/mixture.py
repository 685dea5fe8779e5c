"""Mixtures: which rows an epoch shows, and in which order.

Knows: sources, weights and a seed. Does not know: what a row says, pixels, tokens. Everything here
is a function of the seed and the epoch, so that a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from pumice.data.rows import Rows
from pumice.errors import InputError


class Mixture:
    """Several sources of rows, each with a weight: how often an epoch shows each of its rows.

    Weight 1 shows every row once; 0.5 a random half, another one each epoch; 2.3 every row twice
    and a random 30 per cent a third time.
    """

    def __init__(self, sources: Sequence[tuple[Rows, float]], seed: int = 0) -> None:
        """Raises InputError on a weight that is not a positive number, and when no row is left."""
        for rows, weight in sources:
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"the weight of '{rows.source}' is {weight}; give a number above 0")
        self.rows = [rows for rows, _ in sources]
        self.weights = [float(weight) for _, weight in sources]
        self.seed = seed
        if not len(self):
            raise InputError("the mixture shows no row in an epoch; add a source or raise its weight")

    def __len__(self) -> int:
        """Rows shown in one epoch, repeats counted; the same for every epoch."""
        return sum(round(len(rows) * weight) for rows, weight in zip(self.rows, self.weights, strict=True))

    def order(self, epoch: int) -> np.ndarray:
        """The rows of one epoch in order: int64 (len(self), 2) of source and index in the source."""
        random = np.random.default_rng([self.seed, epoch])
        parts = []
        for source, (rows, weight) in enumerate(zip(self.rows, self.weights, strict=True)):
            count = len(rows)
            whole, rest = divmod(round(count * weight), count)
            picks = np.concatenate([np.tile(np.arange(count), whole), random.permutation(count)[:rest]])
            parts.append(np.stack([np.full_like(picks, source), picks], axis=1))
        return random.permutation(np.concatenate(parts))

    def groups(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The rows of one epoch as lists of (source, index), one list per picture or set of pictures.

        Rows of one group share their pictures and can be packed behind one copy of them. Rows
        without a picture stand alone; a row that an epoch repeats goes to another group. Names are
        compared as they are written: equal names in two sources must mean the same picture, as they
        do for one ImageFinder. Groups are in shuffled order. A malformed row stands
        alone.
        """
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        shown: dict[tuple[int, int], int] = {}
        for source, index in self.order(epoch).tolist():
            row = (source, index)
            shown[row] = turn = shown.get(row, -1) + 1
            picture = int(self._pictures[source][index])
            groups.setdefault((turn, picture) if picture >= 0 else (turn, source, index), []).append(row)
        # By first appearance, a picture with many rows would tend to come early: shuffle once more.
        listed = list(groups.values())
        return [listed[i] for i in np.random.default_rng([self.seed, epoch, 1]).permutation(len(listed))]

    def has_image(self, source: int, index: int) -> bool:
        """Whether a row names a picture."""
        return bool(self._pictures[source][index] >= 0)

    @property
    def max_images(self) -> int:
        """The most pictures that one row names."""
        return self._looked_at[1]

    @property
    def _pictures(self) -> list[np.ndarray]:
        return self._looked_at[0]

    @cached_property
    def _looked_at(self) -> tuple[list[np.ndarray], int]:
        # Numbers instead of names: 665,000 rows' worth of tuples would be kept for the whole run.
        numbers: dict[tuple[str, ...], int] = {(): -1}
        pictures = [
            np.array([numbers.setdefault(_image(rows, i), len(numbers)) for i in range(len(rows))], np.int64)
            for rows in self.rows
        ]
        return pictures, max(map(len, numbers))


def _image(rows: Rows, index: int) -> tuple[str, ...]:
    """The pictures of a row; none of a malformed one, which whoever reads it next will refuse."""
    try:
        return rows[index].image
    except InputError:
        return ()
