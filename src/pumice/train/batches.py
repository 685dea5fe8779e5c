"""What each optimiser step sees: a function of the recipe and the step's number alone.

Knows rows, the processor and packing. Does not know the model. Nothing here is stateful but caches,
so a resumed run continues in the same place by asking for the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from pumice.conversation import Conversation, Message
from pumice.data.check import NOTES, check
from pumice.data.mixture import Mixture
from pumice.data.packing import Pack, Tree, fitting_trees, pack
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError
from pumice.processor import Processor, Sample
from pumice.train.recipe import Recipe, Source

Groups = list[list[tuple[int, int]]]  # rows, as (source, index), that share their pictures
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One optimiser step: packs, each with one flag per tree that says if its pictures are mirrored."""

    packs: list[tuple[Pack, list[bool]]]
    supervised: float  # supervised tokens of all packs: what the loss is divided by
    tokens: int  # tokens computed

    @classmethod
    def of(cls, packs: list[tuple[Pack, list[bool]]]) -> Batch:
        supervised = float(sum(p.weights.sum() for p, _ in packs))
        return cls(packs, supervised, sum(len(p) for p, _ in packs))


@dataclass
class Skipped:
    """Spoiled rows and pictures met so far; InputError once they are more than the recipe allows."""

    allowed: int
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, error: InputError) -> None:
        self.reasons[row] = str(error)
        if len(self.reasons) > self.allowed:
            raise InputError(
                f"{len(self.reasons)} spoiled rows, max_bad_rows allows {self.allowed}; the last: {error}"
            ) from error


class Batches:
    def __init__(self, recipe: Recipe, processor: Processor, processes: int = 1) -> None:
        """processes: that share each step's packs."""
        self.recipe, self.processor, self.processes = recipe, processor, processes
        self.finder = ImageFinder(recipe.pictures or ["."])
        self.skipped = Skipped(recipe.max_bad_rows)
        self.mixture = _mixture(recipe.data, recipe.seed)
        self.mirror = [source.mirror for source in recipe.data]
        self._epoch: tuple[int, Groups] = (-1, [])
        self.starts = [0]  # the step at which each epoch begins, and the last one's end
        for epoch in range(math.ceil(recipe.epochs)):
            share = min(1.0, recipe.epochs - epoch)
            steps = math.ceil(len(self._groups(epoch)) * share / recipe.batch)
            self.starts.append(self.starts[-1] + steps)
        self.steps = min(self.starts[-1], recipe.max_steps or self.starts[-1])

    def __getitem__(self, step: int) -> Batch:
        """The batch of step 0 <= step < steps."""
        epoch = next(e for e in range(len(self.starts) - 1) if step < self.starts[e + 1])
        first = (step - self.starts[epoch]) * self.recipe.batch
        groups = self._groups(epoch)[first : first + self.recipe.batch]
        trees, mirrored = [], {}
        for number, group in enumerate(groups, first):
            allowed = all(self.mirror[source] for source, _ in group)
            chance = np.random.default_rng([self.recipe.seed, epoch, number]).random()
            for tree in self._trees(self.mixture, group):
                trees.append(tree)
                mirrored[id(tree)] = allowed and chance < self.recipe.mirror_chance
        packs = [(p, [mirrored[id(t)] for t in p.trees]) for p in pack(trees, self._budget(trees))]
        return Batch.of(packs)

    def check(self) -> None:
        """Look at every row before the first step; InputError beyond the budget of spoiled ones."""
        report = check(self.mixture.rows, self.finder, decode=False)
        bad_rows = [problem for problem in report.problems if problem.kind not in NOTES]
        if (count := report.rows - report.usable) > self.recipe.max_bad_rows:
            raise InputError(
                f"{count} spoiled rows, max_bad_rows allows {self.recipe.max_bad_rows}; "
                f"the first: {bad_rows[0].source}, row {bad_rows[0].row}: {bad_rows[0].reason}"
            )

    def try_rows(self, count: int) -> None:
        """Prepare up to `count` rows spread over the first epoch; InputError when none teaches anything."""
        order = self.mixture.order(0)
        picked = order[np.linspace(0, len(order) - 1, min(count, len(order)), dtype=int)].tolist()
        reason = ""
        for source, index in picked:
            try:
                row = self.mixture.rows[source][index]
                self.processor.training_sample(row.conversation(self.finder))
                return
            except InputError as error:
                reason = str(error)
        raise InputError(
            f"none of {len(picked)} rows tried can be learned from; the last: {reason}; see pumice data check"
        )

    @cached_property
    def held_out(self) -> Batch:
        """Held-out pictures, the same each time, as one batch."""
        mixture = _mixture(self.recipe.held_out, seed=0)
        groups = mixture.groups(0)[: self.recipe.measure_rows]
        trees = [tree for group in groups for tree in self._trees(mixture, group)]
        if not trees:
            raise InputError("held_out: none of its rows can be used; mend them or leave it out")
        return Batch.of([(p, [False] * len(p.trees)) for p in pack(trees, self.recipe.pack_tokens)])

    def questions(self, count: int) -> list[tuple[Sample, str, str]]:
        """Held-out questions from each source in turn: (prompt, the question's text, the answer's text)."""
        rows = [Rows(source.rows) for source in self.recipe.held_out]
        asked = []
        for number in range(count):
            source = rows[number % len(rows)]
            messages = source[number // len(rows) % len(source)].conversation(self.finder).messages
            turn = next(n for n, message in enumerate(messages) if message.role == "assistant")
            # the plain template drops the question, and its rows may have none
            question = messages[turn - 1].text or "Describe the picture."
            last = Message("user", (*messages[turn - 1].images, question))
            prompt = self.processor.prompt(Conversation((*messages[: turn - 1], last)))
            asked.append((prompt, question, messages[turn].text))
        return asked

    def _groups(self, epoch: int) -> Groups:
        if self._epoch[0] != epoch:
            grouped = self.recipe.order == "length_grouped"
            order = self._by_kind(epoch) if grouped else self.mixture.groups(epoch)
            self._epoch = (epoch, order)
        return self._epoch[1]

    def _by_kind(self, epoch: int) -> Groups:
        """Every row alone, in steps that show pictures in all their rows or in none.

        As haotian-liu/LLaVA's LengthGroupedSampler with `group_by_modality_length`: rows are shuffled
        within each kind and cut into steps, the steps are shuffled, and what is left of both kinds makes
        the last ones. Its sorting by length within a step decides only which process gets which row;
        packing does that here.
        """
        order = self.mixture.order(epoch)
        seen = np.array([self.mixture.has_picture(source, index) for source, index in order.tolist()])
        size = self.recipe.batch
        steps, rest = [], []
        for rows in (order[seen].tolist(), order[~seen].tolist()):
            whole = len(rows) // size * size
            steps += [rows[i : i + size] for i in range(0, whole, size)]
            rest += rows[whole:]
        picked = np.random.default_rng([self.recipe.seed, epoch, 2]).permutation(len(steps))
        return [[tuple(row)] for i in picked for row in steps[i]] + [[tuple(row)] for row in rest]

    def _budget(self, trees: Sequence[Tree]) -> int:
        """Tokens of a pack: fewer where full packs would leave a process without one."""
        if self.processes == 1 or not trees:
            return self.recipe.pack_tokens
        even = math.ceil(sum(map(len, trees)) / self.processes)
        return min(self.recipe.pack_tokens, max(even, *map(len, trees)))

    def _trees(self, mixture: Mixture, group: Sequence[tuple[int, int]]) -> list[Tree]:
        """The rows of one picture: one tree, or several where one would not fit a pack."""
        samples = []
        for source, index in group:
            rows = mixture.rows[source]
            try:
                row = rows[index]
                samples.append(self.processor.training_sample(row.conversation(self.finder)))
            except InputError as error:
                self.skipped.add(f"{rows.path}:{index + 1}", error)
        return fitting_trees(samples, self.recipe.pack_tokens)


def _mixture(sources: Sequence[Source], seed: int) -> Mixture:
    return Mixture([(Rows(s.rows), s.weight) for s in sources], seed)


def prefetch(prepare: Callable[[int], T], first: int, end: int, workers: int) -> Generator[T, None, None]:
    """prepare(step) for first <= step < end, in order; `workers` threads prepare what comes next.

    An error of a step is raised when its turn comes.
    """
    with ThreadPoolExecutor(workers, "rows") as pool:
        waiting: list[Future[T]] = []
        upcoming = iter(range(first, end))
        for _, step in zip(range(workers), upcoming, strict=False):
            waiting.append(pool.submit(prepare, step))
        try:
            while waiting:
                ready = waiting.pop(0).result()
                waiting += [pool.submit(prepare, step) for _, step in zip(range(1), upcoming, strict=False)]
                yield ready
        finally:
            for future in waiting:
                future.cancel()
