"""Samples become packs: one sequence without padding, in which no sample sees another.

Samples about the same pictures share their common beginning: a prefix tree computes the picture and
the question once for five captions. Every token sees exactly the tokens that it would see alone, at
the same positions, so that losses equal those of the samples run one by one. What a token sees is told in
runs (`pumice.model.packed`), never as a matrix: a plain sample of n tokens costs n numbers, not n * n.

Shapes: T tokens of a pack, S supervised predictions, n tokens of one tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pumice.config import IMAGE_TOKEN
from pumice.conversation import ImagePart
from pumice.geometry import Layout
from pumice.model.packed import Run
from pumice.processor import Sample
from pumice.tokens import IGNORE


@dataclass(frozen=True)
class Tree:
    """One prefix tree, its nodes in order of creation: a parent always stands before its children."""

    input_ids: np.ndarray  # (n,)
    positions: np.ndarray  # (n,), depth in the tree
    parents: np.ndarray  # (n,), -1 where a sample begins
    sources: np.ndarray  # (s,), node from whose hidden state a supervised token is predicted
    targets: np.ndarray  # (s,), that token
    weights: np.ndarray  # (s,) float32, how many samples share the prediction
    images: tuple[ImagePart, ...]  # in order of their placeholders
    layouts: tuple[Layout, ...]  # of the same

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def runs(self) -> list[Run]:
        """The tree as stretches of nodes that follow each other; `before` counts runs from 0 in this tree."""
        starts = np.flatnonzero(self.parents != np.arange(-1, len(self) - 1))
        starts = np.concatenate([[0], starts[starts > 0]])
        ends = [*starts[1:].tolist(), len(self)]
        runs: list[Run] = []
        for start, end in zip(starts.tolist(), ends, strict=True):
            parent = int(self.parents[start])
            if parent < 0:
                runs.append(Run(end - start))
                continue
            owner = int(np.searchsorted(starts, parent, "right")) - 1
            before = (*runs[owner].before, (owner, parent - int(starts[owner]) + 1))
            runs.append(Run(end - start, before))
        return runs


def prefix_tree(samples: Sequence[Sample]) -> Tree:
    """Merge the common beginnings of samples that show the same pictures in the same order."""
    children: list[dict[tuple[int, int], int]] = []
    ids: list[int] = []
    parents: list[int] = []
    shown: list[tuple[ImagePart, Layout]] = []
    roots: dict[tuple[int, int], int] = {}
    predictions: dict[int, int] = {}  # node -> number of samples that learn to write it
    for sample in samples:
        if (sample.images, sample.layouts) != (samples[0].images, samples[0].layouts):
            raise ValueError(f"samples {samples[0].id!r} and {sample.id!r} show different pictures")
        # the picture that each placeholder belongs to
        owners = [n for n, layout in enumerate(sample.layouts) for _ in range(layout.tokens)]
        node, seen = -1, 0
        for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
            number = owners[seen] if token == IMAGE_TOKEN else -1
            here = children[node] if node >= 0 else roots
            if (token, number) not in here:
                here[token, number] = len(ids)
                ids.append(token)
                parents.append(node)
                children.append({})
                if token == IMAGE_TOKEN and (not seen or owners[seen - 1] != number):
                    shown.append((sample.images[number], sample.layouts[number]))
            node = here[token, number]
            seen += token == IMAGE_TOKEN
            if label != IGNORE and parents[node] >= 0:
                predictions[node] = predictions.get(node, 0) + 1
    size = len(ids)
    positions = np.zeros(size, np.int64)
    for node, parent in enumerate(parents):
        if parent >= 0:
            positions[node] = positions[parent] + 1
    learned = np.array(sorted(predictions), np.int64)
    return Tree(
        input_ids=np.array(ids, np.int64),
        positions=positions,
        parents=np.array(parents, np.int64),
        sources=np.array(parents, np.int64)[learned],
        targets=np.array(ids, np.int64)[learned],
        weights=np.array([predictions[n] for n in learned.tolist()], np.float32),
        images=tuple(image for image, _ in shown),
        layouts=tuple(layout for _, layout in shown),
    )


def fitting_trees(samples: Sequence[Sample], budget: int) -> list[Tree]:
    """One tree of all samples, or trees of halves of them until each has at most `budget` tokens.

    A single sample stays whole, however long.
    """
    if not samples:
        return []
    tree = prefix_tree(samples)
    if len(tree) <= budget or len(samples) == 1:
        return [tree]
    half = len(samples) // 2
    return fitting_trees(samples[:half], budget) + fitting_trees(samples[half:], budget)


@dataclass(frozen=True)
class Pack:
    """Trees end to end."""

    trees: tuple[Tree, ...]

    @property
    def input_ids(self) -> np.ndarray:
        return np.concatenate([t.input_ids for t in self.trees])

    @property
    def positions(self) -> np.ndarray:
        return np.concatenate([t.positions for t in self.trees])

    @property
    def sources(self) -> np.ndarray:
        starts = np.cumsum([0, *(len(t) for t in self.trees[:-1])])
        return np.concatenate([t.sources + s for t, s in zip(self.trees, starts, strict=True)])

    @property
    def runs(self) -> list[Run]:
        """The trees' runs, counted from the pack's first."""
        runs: list[Run] = []
        for tree in self.trees:
            first = len(runs)
            runs += [Run(n, tuple((first + owner, c) for owner, c in before)) for n, before in tree.runs]
        return runs

    @property
    def targets(self) -> np.ndarray:
        return np.concatenate([t.targets for t in self.trees])

    @property
    def weights(self) -> np.ndarray:
        return np.concatenate([t.weights for t in self.trees])

    @property
    def images(self) -> list[ImagePart]:
        return [image for t in self.trees for image in t.images]

    @property
    def layouts(self) -> list[Layout]:
        return [layout for t in self.trees for layout in t.layouts]

    def __len__(self) -> int:
        return sum(len(t) for t in self.trees)


def pack(trees: Iterable[Tree], budget: int) -> list[Pack]:
    """Fill packs of at most `budget` tokens, longest tree first; a longer tree stands alone."""
    packs: list[list[Tree]] = []
    for tree in sorted(trees, key=len, reverse=True):
        for filled in packs:
            if sum(map(len, filled)) + len(tree) <= budget:
                filled.append(tree)
                break
        else:
            packs.append([tree])
    return [Pack(tuple(filled)) for filled in packs]
