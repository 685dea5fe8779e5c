"""Mixtures: which rows an epoch shows, and in which order.

Everything is a function of the seed and the epoch, so a resumed run gets the rows of an uninterrupted one.
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
        """Return the rows of an epoch in order: int64 (len(self), 2), source and index in the source."""
        random = np.random.default_rng([self.seed, epoch])
        parts = []
        for source, (rows, weight) in enumerate(zip(self.rows, self.weights, strict=True)):
            count = len(rows)
            repeats, extra = divmod(round(count * weight), count)
            picks = np.concatenate([np.tile(np.arange(count), repeats), random.permutation(count)[:extra]])
            parts.append(np.stack([np.full_like(picks, source), picks], axis=1))
        return random.permutation(np.concatenate(parts))

    def groups(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Return the rows of an epoch in groups of (source, index), shuffled; a group shares its images.

        Rows of a group can be packed behind one copy of their images. Rows without images, and malformed
        rows, are groups of one. A row that an epoch repeats goes to another group each time. Names are
        compared as written: equal names in two sources must mean the same image, as for one ImageFinder.
        """
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        repeats: dict[tuple[int, int], int] = {}
        for source, index in self.order(epoch).tolist():
            row = (source, index)
            repeats[row] = repeat = repeats.get(row, -1) + 1
            image_set = int(self._image_sets[source][index])
            key = (repeat, image_set) if image_set >= 0 else (repeat, source, index)
            groups.setdefault(key, []).append(row)
        # Groups are in order of first appearance, where many rows come early: shuffle once more.
        in_order = list(groups.values())
        return [in_order[i] for i in np.random.default_rng([self.seed, epoch, 1]).permutation(len(in_order))]

    def has_image(self, source: int, index: int) -> bool:
        """Return whether a row names an image."""
        return bool(self._image_sets[source][index] >= 0)

    @property
    def max_images(self) -> int:
        """The largest number of images that one row names."""
        return self._scan[1]

    @property
    def _image_sets(self) -> list[np.ndarray]:
        return self._scan[0]

    @cached_property
    def _scan(self) -> tuple[list[np.ndarray], int]:
        """Number the sets of images that rows name (-1: none); also return the size of the largest set."""
        # Numbers instead of names: tuples of 665,000 rows would stay in memory for the whole run.
        numbers: dict[tuple[str, ...], int] = {(): -1}
        image_sets = [
            np.array([numbers.setdefault(_image(rows, i), len(numbers)) for i in range(len(rows))], np.int64)
            for rows in self.rows
        ]
        return image_sets, max(map(len, numbers))


def _image(rows: Rows, index: int) -> tuple[str, ...]:
    """Return the image names of a row; none for a malformed row, which its reader reports."""
    try:
        return rows[index].image
    except InputError:
        return ()
