"""The batch of each optimiser step, computed from the recipe and the step's number alone.

There is no state but caches: a resumed run asks for the next step and gets what it would have got.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from pumice.boxes import holds_boxes
from pumice.conversation import Conversation, Message
from pumice.data.check import NOTES, check
from pumice.data.mapping import RowMapping
from pumice.data.mixture import Groups, Mixture
from pumice.data.packing import Pack, Tree, fitting_trees, pack, pack_evenly
from pumice.data.rows import ImageFinder, Rows
from pumice.data.sources.recognise import Part
from pumice.errors import InputError, counted
from pumice.processor import Processor, Sample
from pumice.train.recipe import Recipe, RowSource

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """The packs of one optimiser step, each with one flag per tree: whether its images are mirrored."""

    packs: list[tuple[Pack, list[bool]]]
    supervised: float  # supervised tokens of all packs; the summed loss is divided by it
    tokens: int  # tokens that the model computes

    @classmethod
    def of(cls, packs: list[tuple[Pack, list[bool]]]) -> Batch:
        supervised = float(sum(p.weights.sum() for p, _ in packs))
        return cls(packs, supervised, sum(len(p) for p, _ in packs))


@dataclass
class Skipped:
    """Bad rows so far, with their reasons. `add` raises InputError when there are more than `allowed`."""

    allowed: int
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, error: InputError) -> None:
        self.reasons[row] = str(error)
        if len(self.reasons) > self.allowed:
            raise InputError(
                f"{counted(len(self.reasons), 'bad row')}, max_bad_rows allows {self.allowed}; the last: "
                f"{error}"
            ) from error


class Batches:
    """All batches of a run, indexed by step."""

    def __init__(self, recipe: Recipe, processor: Processor, processes: int = 1) -> None:
        """processes: how many share the packs of each step."""
        self.recipe, self.processor, self.processes = recipe, processor, processes
        self.finder = ImageFinder(recipe.pictures or ["."])
        self.skipped = Skipped(recipe.max_bad_rows)
        self.mixture = _mixture(recipe.data, recipe.seed, recipe.shuffle_block)
        self.may_mirror = [source.mirror for source in recipe.data]
        self._cached_epoch: tuple[int, Sequence[list[tuple[int, int]]]] = (-1, [])
        self._epoch_lock = threading.Lock()
        self.pictures = len(self._groups(0))  # of an epoch, each with all its rows
        self.epoch_starts = [0]  # first step of each epoch, and the end of the last one
        for epoch in range(math.ceil(recipe.epochs)):
            share = min(1.0, recipe.epochs - epoch)
            steps = math.ceil(len(self._groups(epoch)) * share / recipe.batch)
            self.epoch_starts.append(self.epoch_starts[-1] + steps)
        self.steps = min(self.epoch_starts[-1], recipe.max_steps or self.epoch_starts[-1])

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step, 0 <= step < steps."""
        # 1. Find the step's epoch, and its groups of rows in that epoch's order.
        epoch = next(e for e in range(len(self.epoch_starts) - 1) if step < self.epoch_starts[e + 1])
        first = (step - self.epoch_starts[epoch]) * self.recipe.batch
        groups = self._groups(epoch)[first : first + self.recipe.batch]
        # 2. Make trees. Each group draws its own chance, so the draw does not depend on earlier steps.
        trees: list[Tree] = []
        mirrored: dict[int, bool] = {}  # by the id of the tree
        for number, group in enumerate(groups, first):
            allowed = all(self.may_mirror[source] for source, _ in group)
            chance = np.random.default_rng([self.recipe.seed, epoch, number]).random()
            mirror = allowed and chance < self.recipe.mirror_chance
            group_trees, mirror = self._trees(self.mixture, group, mirror)
            trees += group_trees
            mirrored |= dict.fromkeys(map(id, group_trees), mirror)
        # 3. Pack the trees, and carry each tree's flag along.
        packs = [(p, [mirrored[id(t)] for t in p.trees]) for p in self._pack(trees)]
        return Batch.of(packs)

    def check(self) -> None:
        """Check every row before the first step. Raises InputError when too many rows are bad."""
        bad = sum(int(rows.bad_rows(self.finder).sum()) for rows in self.mixture.rows)
        if bad <= self.recipe.max_bad_rows:
            return
        report = check(self.mixture.rows, self.finder, decode=False)
        bad_rows = [problem for problem in report.problems if problem.kind not in NOTES]
        if (count := report.rows - report.usable) > self.recipe.max_bad_rows:
            raise InputError(
                f"{counted(count, 'bad row')}, max_bad_rows allows {self.recipe.max_bad_rows}; "
                f"the first: {bad_rows[0].source}, row {bad_rows[0].row}: {bad_rows[0].reason}"
            )

    @property
    def added(self) -> int:
        """The rows that name pictures without `<image>`, which is put before the first question."""
        return sum(rows.contents.added for rows in self.mixture.rows)

    def try_rows(self, count: int) -> int:
        """Prepare up to `count` rows of the first epoch, until one fits a pack.

        Returns the fewest tokens of one. Raises InputError if none has supervised tokens.
        """
        order = self.mixture.order(0)
        picked = order[np.linspace(0, len(order) - 1, min(count, len(order)), dtype=int)].tolist()
        reason, fewest = "", math.inf
        for source, index in picked:
            try:
                row = self.mixture.rows[source][index]
                sample = self.processor.training_sample(row.conversation(self.finder))
            except InputError as error:
                reason = str(error)
                continue
            fewest = min(fewest, len(sample.input_ids))
            if fewest <= self.recipe.pack_tokens:
                break
        if fewest == math.inf:
            raise InputError(
                f"none of {counted(len(picked), 'row')} tried can be learned from; the last: {reason}; see "
                "pumice data check"
            )
        return int(fewest)

    @cached_property
    def _held_out_mixture(self) -> Mixture:
        return _mixture(self.recipe.held_out, 0, self.recipe.shuffle_block)

    @cached_property
    def held_out(self) -> Batch:
        """The held-out rows as one batch, the same at every measurement."""
        mixture = self._held_out_mixture
        groups = mixture.groups(0)[: self.recipe.measure_rows]
        trees = [tree for group in groups for tree in self._trees(mixture, group)[0]]
        if not trees:
            raise InputError("held_out: none of its rows can be used; fix them or leave it out")
        return Batch.of([(p, [False] * len(p.trees)) for p in self._pack(trees)])

    def questions(self, count: int) -> list[tuple[Sample, str, str]]:
        """Return held-out questions, from each source in turn, as (prompt, question, reference answer)."""
        rows = self._held_out_mixture.rows
        questions = []
        for number in range(count):
            source = rows[number % len(rows)]
            row = source[number // len(rows) % len(source)]
            messages = self.processor.with_boxes(row.conversation(self.finder)).messages
            turn = next(n for n, message in enumerate(messages) if message.role == "assistant")
            # Rows for the plain template may have no question: the template drops it.
            question = messages[turn - 1].text or "Describe the picture."
            last = Message("user", (*messages[turn - 1].images, question))
            prompt = self.processor.prompt(Conversation((*messages[: turn - 1], last)))
            questions.append((prompt, question, messages[turn].text))
        return questions

    def _groups(self, epoch: int) -> Sequence[list[tuple[int, int]]]:
        """Return the groups of an epoch in order. The last epoch asked for stays in memory."""
        with self._epoch_lock:  # threads that prepare steps ask at once when an epoch begins
            if self._cached_epoch[0] != epoch:
                grouped = self.recipe.order == "length_grouped"
                order = self._length_grouped(epoch) if grouped else self.mixture.groups(epoch)
                self._cached_epoch = (epoch, order)
            return self._cached_epoch[1]

    def _length_grouped(self, epoch: int) -> Groups:
        """Return an epoch's rows, each alone, in steps whose rows all have images or all have none.

        This follows haotian-liu/LLaVA's LengthGroupedSampler with `group_by_modality_length`: rows of each
        kind are shuffled and cut into steps, the steps are shuffled, and the leftover rows make the last
        steps. LLaVA also sorts by length within a step, but that only decides which process gets which row;
        packing does that here.
        """
        random = np.random.default_rng([self.recipe.seed, epoch, 2])
        size = self.recipe.batch
        ordered: list[np.ndarray] = []
        leftover = [np.zeros((0, 2), np.int64)] * 2  # with images, and without
        # Sources that are read in blocks are shuffled window by window. What is left goes on in the next.
        for window in self.mixture.windows(epoch):
            with_image = self.mixture.with_images(window)
            kinds = zip(leftover, (window[with_image], window[~with_image]), strict=True)
            both = [np.concatenate(rows) for rows in kinds]
            steps = np.concatenate([rows[: len(rows) // size * size].reshape(-1, size, 2) for rows in both])
            leftover = [rows[len(rows) // size * size :] for rows in both]
            ordered.append(steps[random.permutation(len(steps))].reshape(-1, 2))
        rows = np.concatenate([*ordered, *leftover])
        return Groups(rows, np.ones(len(rows), np.int64))

    def _pack(self, trees: Sequence[Tree]) -> list[Pack]:
        """Join trees to packs; with several processes, to packs that keep all of them equally busy."""
        if self.processes == 1:
            return pack(trees, self.recipe.pack_tokens)
        return pack_evenly(trees, self.recipe.pack_tokens, self.processes)

    def _trees(
        self, mixture: Mixture, group: Sequence[tuple[int, int]], mirror: bool = False
    ) -> tuple[list[Tree], bool]:
        """Merge the rows of one group into a tree, or into several if one would not fit a pack.

        mirror: show the group's pictures flipped left to right, and write its boxes so. Returns also whether
        that is done: not where a text itself holds boxes, which would no longer be right.
        """
        conversations = []
        for source, index in group:
            rows = mixture.rows[source]
            name = f"{rows.label}:{index + 1}"
            try:
                conversations.append((name, rows[index].conversation(self.finder)))
            except InputError as error:
                self.skipped.add(name, error)
        mirror = mirror and not any(holds_boxes(conversation) for _, conversation in conversations)
        samples = []
        for name, conversation in conversations:
            try:
                samples.append(self.processor.training_sample(conversation, mirror=mirror))
            except InputError as error:
                self.skipped.add(name, error)
        return fitting_trees(samples, self.recipe.pack_tokens), mirror


def open_rows(source: RowSource) -> Rows:
    """Return the rows of a recipe's source."""
    part = Part(source.split, source.config, source.revision)
    return Rows(source.rows, mapping=RowMapping(source.columns, source.question), part=part)


def _mixture(sources: Sequence[RowSource], seed: int, shuffle_block: int | None) -> Mixture:
    return Mixture([(open_rows(source), source.weight) for source in sources], seed, shuffle_block)


def prefetch(prepare: Callable[[int], T], first: int, end: int, workers: int) -> Generator[T, None, None]:
    """Yield prepare(step) for first <= step < end, in order, while `workers` threads prepare the next steps.

    If preparing a step fails, its error is raised when the step is due.
    """
    with ThreadPoolExecutor(workers, "rows") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for step in range(first, end):
                pending.append(pool.submit(prepare, step))
                # Keep one step per worker in the queue: more would only hold memory.
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
