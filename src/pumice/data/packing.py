"""Packing: samples are joined to sequences without padding, and no sample sees another.

Samples about the same images share their common beginning in a prefix tree: the image and the question are
computed once for five captions. Every token attends to the tokens that it would see alone, at the same
positions, so the losses equal those of the samples run one by one. Attention is described by runs
(`pumice.model.packed`), not by a mask: a sample of n tokens costs n numbers instead of n * n.

Shapes: T tokens of a pack, n tokens of one tree, s supervised tokens of one tree.
"""

from __future__ import annotations

import heapq
import math
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
    """A prefix tree of samples: one node per token, each parent before its children."""

    input_ids: np.ndarray  # (n,)
    positions: np.ndarray  # (n,), depth in the tree
    parents: np.ndarray  # (n,), index of the token before; -1 where a sample begins
    sources: np.ndarray  # (s,), node whose hidden state predicts a supervised token
    targets: np.ndarray  # (s,), the supervised token
    weights: np.ndarray  # (s,) float32, number of samples that share the prediction
    images: tuple[ImagePart, ...]  # in order of their placeholders
    layouts: tuple[Layout, ...]  # one per image

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def runs(self) -> list[Run]:
        """The tree as runs: stretches of nodes, each node the child of the one before it.

        A run's `before` lists the (run, number of its tokens) that it sees, run 0 being the tree's first.
        """
        # A run starts where a node's parent is not the node before it: at a new sample or a branch.
        starts = np.flatnonzero(self.parents != np.arange(-1, len(self) - 1))
        starts = np.concatenate([[0], starts[starts > 0]])
        ends = [*starts[1:].tolist(), len(self)]
        runs: list[Run] = []
        for start, end in zip(starts.tolist(), ends, strict=True):
            parent = int(self.parents[start])
            if parent < 0:
                runs.append(Run(end - start))
                continue
            # A branch sees what the parent's run sees, and that run up to the parent itself.
            parent_run = int(np.searchsorted(starts, parent, "right")) - 1
            before = (*runs[parent_run].before, (parent_run, parent - int(starts[parent_run]) + 1))
            runs.append(Run(end - start, before))
        return runs


def prefix_tree(samples: Sequence[Sample]) -> Tree:
    """Merge the common beginnings of samples that show the same images in the same order.

    Raises ValueError when their images differ.
    """
    ids: list[int] = []
    parents: list[int] = []
    # An edge is (token, image): equal placeholders of two images are different edges.
    children: list[dict[tuple[int, int], int]] = []
    roots: dict[tuple[int, int], int] = {}
    tree_images: list[tuple[ImagePart, Layout]] = []
    predictions: dict[int, int] = {}  # node -> number of samples that learn to write it
    for sample in samples:
        if (sample.images, sample.layouts) != (samples[0].images, samples[0].layouts):
            raise ValueError(f"samples {samples[0].id!r} and {sample.id!r} show different pictures")
        # 1. Tell which image each placeholder of the sample belongs to.
        owners = [n for n, layout in enumerate(sample.layouts) for _ in range(layout.tokens)]
        node, placeholders = -1, 0
        # 2. Walk down from the root. Follow the nodes of earlier samples and add missing ones.
        for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
            image = owners[placeholders] if token == IMAGE_TOKEN else -1
            siblings = children[node] if node >= 0 else roots
            if (token, image) not in siblings:
                siblings[token, image] = len(ids)
                ids.append(token)
                parents.append(node)
                children.append({})
                # The first placeholder of an image brings the image itself.
                if token == IMAGE_TOKEN and (not placeholders or owners[placeholders - 1] != image):
                    tree_images.append((sample.images[image], sample.layouts[image]))
            node = siblings[token, image]
            placeholders += token == IMAGE_TOKEN
            # 3. Count supervised tokens. A sample's first token has nothing before it to predict it from.
            if label != IGNORE and parents[node] >= 0:
                predictions[node] = predictions.get(node, 0) + 1
    # 4. A node's position is its depth, which is the token's position in its own sample.
    positions = np.zeros(len(ids), np.int64)
    for node, parent in enumerate(parents):
        if parent >= 0:
            positions[node] = positions[parent] + 1
    # 5. A supervised token is predicted from the hidden state of its parent.
    supervised = np.array(sorted(predictions), np.int64)
    return Tree(
        input_ids=np.array(ids, np.int64),
        positions=positions,
        parents=np.array(parents, np.int64),
        sources=np.array(parents, np.int64)[supervised],
        targets=np.array(ids, np.int64)[supervised],
        weights=np.array([predictions[n] for n in supervised.tolist()], np.float32),
        images=tuple(image for image, _ in tree_images),
        layouts=tuple(layout for _, layout in tree_images),
    )


def fitting_trees(samples: Sequence[Sample], budget: int) -> list[Tree]:
    """Merge all samples into one tree, or halve them until each tree has at most `budget` tokens.

    A single sample is never cut, however long it is.
    """
    if not samples:
        return []
    tree = prefix_tree(samples)
    if len(tree) <= budget or len(samples) == 1:
        return [tree]
    half = len(samples) // 2
    return fitting_trees(samples[:half], budget) + fitting_trees(samples[half:], budget)


@dataclass(frozen=True)
class Pack(Tree):
    """One sequence of trees, joined end to end: a tree in which each of them begins anew."""

    trees: tuple[Tree, ...]

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Pack:
        """Join trees."""
        starts = np.cumsum([0, *map(len, trees[:-1])])

        def join(name: str) -> np.ndarray:
            return np.concatenate([getattr(tree, name) for tree in trees])

        def join_nodes(name: str) -> np.ndarray:
            """Numbers of nodes count from the first node of the pack; -1 stays."""
            nodes = [(getattr(tree, name), start) for tree, start in zip(trees, starts, strict=True)]
            return np.concatenate([np.where(own < 0, own, own + start) for own, start in nodes])

        return cls(
            input_ids=join("input_ids"),
            positions=join("positions"),
            parents=join_nodes("parents"),
            sources=join_nodes("sources"),
            targets=join("targets"),
            weights=join("weights"),
            images=tuple(image for tree in trees for image in tree.images),
            layouts=tuple(layout for tree in trees for layout in tree.layouts),
            trees=tuple(trees),
        )


def pack(trees: Iterable[Tree], budget: int) -> list[Pack]:
    """Fill packs of at most `budget` tokens, longest tree first. A longer tree gets its own pack."""
    in_order = sorted(trees, key=len, reverse=True)
    packs: list[list[Tree]] = []
    room = np.full(len(in_order), budget)  # in each pack, also in those that are not begun
    for tree in in_order:
        # First fit: small trees fill what the large ones leave.
        number = int(np.argmax(room >= min(len(tree), budget)))
        if number == len(packs):
            packs.append([])
        packs[number].append(tree)
        room[number] -= len(tree)
    return [Pack.of(filled) for filled in packs]


def pack_evenly(trees: Iterable[Tree], budget: int, processes: int) -> list[Pack]:
    """Fill packs that are nearly equal in tokens, as many for each process, so that none waits for another.

    A pack has at most `budget` tokens, or one longer tree. The largest packs come first: packs that processes
    compute at the same time are alike. There are fewer than processes only if there are fewer trees.
    """
    in_order = sorted(trees, key=len, reverse=True)
    if not in_order:
        return []
    limit = max(budget, len(in_order[0]))
    count = processes * math.ceil(sum(map(len, in_order)) / (processes * budget))
    while True:
        # The longest tree first, each into the emptiest pack (LPT scheduling, Graham 1969).
        heap = [(0, number) for number in range(count)]
        packs: list[list[Tree]] = [[] for _ in heap]
        for tree in in_order:
            tokens, number = heapq.heappop(heap)
            packs[number].append(tree)
            heapq.heappush(heap, (tokens + len(tree), number))
        if max(heap)[0] <= limit:
            filled = [Pack.of(trees) for trees in packs if trees]
            return sorted(filled, key=len, reverse=True)
        count += processes
