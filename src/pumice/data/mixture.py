"""Mixtures: which rows an epoch shows, and in which order.

Everything is a function of the seed, the epoch, the numbers of rows and the size of a block, so a resumed run
gets the rows of an uninterrupted one, with any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import numpy as np

from pumice.data.contents import NO_IMAGES
from pumice.data.rows import Rows
from pumice.errors import InputError

WINDOW = 8  # blocks whose rows are shuffled together


class Groups(Sequence[list[tuple[int, int]]]):
    """The rows of an epoch, as (source, index), in groups that share their images."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """rows: (n, 2), source and index in the source, group after group. lengths: of each group."""
        self._rows, self._starts = rows, np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[tuple[int, int]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[tuple[int, int]]]: ...
    def __getitem__(self, index: int | slice) -> list[tuple[int, int]] | list[list[tuple[int, int]]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return [
            (source, row)
            for source, row in self._rows[self._starts[index] : self._starts[index + 1]].tolist()
        ]


class Mixture:
    """Several sources of rows, each with a weight: how often an epoch shows each of its rows.

    Weight 1 shows every row once; 0.5 a random half, another one each epoch; 2.3 every row twice
    and a random 30 per cent a third time.

    Rows are shuffled in two steps, so that sources which are read in blocks are read in long pieces: blocks
    of `shuffle_block` consecutive rows, and then the rows of each `WINDOW` blocks that follow each other.
    Blocks of one row are shuffled all together.
    """

    def __init__(
        self, sources: Sequence[tuple[Rows, float]], seed: int = 0, shuffle_block: int | None = None
    ) -> None:
        """shuffle_block: of the sources if None: 1 if all are plain files, else 1,000.

        Raises InputError on a weight that is not a positive number, and when no row is left.
        """
        for rows, weight in sources:
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"the weight of '{rows.source}' is {weight}; give a number above 0")
        self.rows = [rows for rows, _ in sources]
        self.weights = [float(weight) for _, weight in sources]
        self.seed = seed
        self.shuffle_block = shuffle_block or max(
            (rows.opened.shuffle_block for rows in self.rows), default=1
        )
        if not len(self):
            raise InputError("the mixture shows no row in an epoch; add a source or raise its weight")
        for rows in self.rows:
            # A step may show the end of one window and the beginning of the next.
            rows.opened.keep(2 * WINDOW * self.shuffle_block)

    def __len__(self) -> int:
        """Rows shown in one epoch, repeats counted; the same for every epoch."""
        return sum(round(len(rows) * weight) for rows, weight in zip(self.rows, self.weights, strict=True))

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in order: int64 (len(self), 2), source and index in the source."""
        return np.concatenate(self.windows(epoch))

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Return the rows of an epoch in order, as `order` does, in the pieces that are shuffled together."""
        random = np.random.default_rng([self.seed, epoch])
        size = self.shuffle_block
        parts = []
        for source, (rows, weight) in enumerate(zip(self.rows, self.weights, strict=True)):
            count = len(rows)
            repeats, extra = divmod(round(count * weight), count)
            further = random.permutation(count) if size == 1 else _permuted_blocks(count, size, random)
            picks = np.concatenate([np.tile(np.arange(count), repeats), further[:extra]])
            parts.append(np.stack([np.full_like(picks, source), picks], axis=1))
        if size == 1:
            return [random.permutation(np.concatenate(parts))]
        # Shuffle blocks of all sources, and then the rows of each window.
        blocks = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
        shuffled = [blocks[number] for number in random.permutation(len(blocks))]
        return [
            random.permutation(np.concatenate(shuffled[start : start + WINDOW]))
            for start in range(0, len(shuffled), WINDOW)
        ]

    def groups(self, epoch: int) -> Groups:
        """Return the rows of an epoch in groups of (source, index), shuffled; a group shares its images.

        Rows of a group can be packed behind one copy of their images. Rows without images, and malformed
        rows, are groups of one. A row that an epoch repeats goes to another group each time. Names are
        compared as written: equal names in two sources must mean the same image, as for one ImageFinder.
        Images inside a source are compared by their contents. A group does not reach beyond a window.
        """
        random = np.random.default_rng([self.seed, epoch, 1])
        parts = [self._group(window, random) for window in self.windows(epoch)]
        rows, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Groups(rows, lengths)

    def _group(self, order: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return rows group after group, and the length of each group."""
        # 1. Two rows are of one group if they show the same images and have been shown equally often.
        rows = order[:, 0] * (1 << 40) + order[:, 1]
        image_sets = self._sets_of(order)
        alone = image_sets == NO_IMAGES
        keys = (_times_before(rows), alone, np.where(alone, rows, image_sets))
        # 2. Number the groups in order of their first rows; rows of a group stay in order.
        by_key = np.lexsort(keys)
        new = np.append(True, np.any([key[by_key][1:] != key[by_key][:-1] for key in keys], axis=0))
        group = np.empty(len(order), np.int64)
        group[by_key] = np.cumsum(new) - 1
        first = by_key[new]
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        # 3. Many rows come early among groups in order of first appearance: shuffle once more.
        place = np.empty(len(first), np.int64)
        place[random.permutation(len(first))] = np.arange(len(first))
        places = place[rank[group]]
        return order[np.argsort(places, kind="stable")], np.bincount(places)

    def _sets_of(self, order: np.ndarray) -> np.ndarray:
        """Return (n,), the set of images of each row of an order."""
        image_sets = np.empty(len(order), np.int64)
        for source, rows in enumerate(self.rows):
            chosen = order[:, 0] == source
            image_sets[chosen] = rows.contents.image_sets[order[chosen, 1]]
        return image_sets

    def with_images(self, order: np.ndarray) -> np.ndarray:
        """Return (n,) bool: whether each row of an order names an image."""
        return self._sets_of(order) != NO_IMAGES

    def max_images(self, frames: int = 1) -> int:
        """Return the most pictures that one row shows. frames: as how many a video counts."""
        return max(rows.contents.max_images(frames) for rows in self.rows)


def _permuted_blocks(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Return 0 to count - 1 in blocks of `size` consecutive numbers, the blocks shuffled."""
    starts = random.permutation(np.arange(0, count, size))
    return np.concatenate([np.arange(start, min(start + size, count)) for start in starts])


def _times_before(rows: np.ndarray) -> np.ndarray:
    """Return how often each value occurs before its place."""
    by_value = np.argsort(rows, kind="stable")
    in_order = rows[by_value]
    new = np.append(True, in_order[1:] != in_order[:-1])
    starts = np.flatnonzero(new)[np.cumsum(new) - 1]
    times = np.empty(len(rows), np.int64)
    times[by_value] = np.arange(len(rows)) - starts
    return times
