"""What a benchmark is: how its official files become questions, how answers are scored, what is the headline.

One class per benchmark, in `tasks/`, found by being there. Knows: the terms that all benchmarks share.
Does not know: any benchmark, and how answers are made.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pumice.errors import InputError
from pumice.evaluate.files import ImageFile

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """One question. Its prompt is the text after the pictures, without the chat template.

    meta: the truth and whatever the score needs; "category" and "group" (whose questions are drawn
    together for the interval) have a meaning everywhere. also: the id in LLaVA's own question files,
    where that is another one; several questions may share it and are then told apart by their text.
    """

    id: str
    images: tuple[ImageFile, ...]
    prompt: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    also: str = ""

    @property
    def group(self) -> str:
        return str(self.meta.get("group") or (self.images[0].name if self.images else self.id))


class Answered(NamedTuple):
    question: Question
    text: str  # as the model gave it


@dataclass(frozen=True)
class Cell:
    """A part of the score: its value in the unit of the headline, and how many questions it rests on."""

    value: float
    count: int


@dataclass
class Score:
    """metrics: name -> number, the headline among them. categories: title -> name -> Cell.

    values: per answered question how right it is, 0 to 1, None where it is not scored by itself.
    statistic: the headline, were each question drawn so often (weights); the mean of values when None.
    """

    metrics: dict[str, float]
    categories: dict[str, dict[str, Cell]] = field(default_factory=dict)
    values: list[float | None] = field(default_factory=list)
    statistic: Callable[[Floats], float] | None = None
    notes: list[str] = field(default_factory=list)
    judge: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where the official files come from. sizes: questions by split, of the version that is known."""

    url: str
    version: str
    licence: str
    layout: tuple[str, ...]
    sizes: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)

    @property
    def files(self) -> str:
        return ", ".join(self.layout)

    def known(self, split: str) -> tuple[int, ...]:
        """How many questions the known versions of a split hold; none where that is not known."""
        size = self.sizes.get(split, ())
        return (size,) if isinstance(size, int) else size


class Task(ABC):
    """A benchmark. A new one is a new file in tasks/ with a subclass that sets these names."""

    name: ClassVar[str]
    title: ClassVar[str]
    headline: ClassVar[str]  # a key of Score.metrics
    unit: ClassVar[str] = "%"
    lower_is_better: ClassVar[bool] = False  # of the headline; an answer's value is always better higher
    source: ClassVar[Source]
    splits: ClassVar[tuple[str, ...]] = ("test",)  # the first is the published one that can be scored here
    rank: ClassVar[int] = 100  # place in lists
    max_new_tokens: ClassVar[int] = 128
    judged: ClassVar[bool] = False

    def __init__(self, split: str | None = None) -> None:
        if split is not None and split not in self.splits:
            raise InputError(f"{self.name} has no split {split!r}; use one of {', '.join(self.splits)}")
        self.split = split or self.splits[0]

    @abstractmethod
    def questions(self, data: Path) -> Iterator[Question]:
        """The questions of the official files below `data`, in their order. Raises InputError."""

    @abstractmethod
    def score(self, answered: Sequence[Answered]) -> Score:
        """Scores answers, in the order of the questions. Raises InputError where the truth is not public."""

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Writes the file that the benchmark's server or official script takes. Raises InputError."""
        raise InputError(f"{self.name} has no server to submit to; it is scored here")


def categories(answered: Sequence[Answered], values: Sequence[float], key: str) -> dict[str, Cell]:
    """Means in percent of the questions of each meta[key], in order of appearance."""
    sums: dict[str, list[float]] = {}
    for (question, _), value in zip(answered, values, strict=True):
        if (name := question.meta.get(key)) is not None:
            sums.setdefault(str(name), []).append(value)
    return {name: Cell(100 * sum(found) / len(found), len(found)) for name, found in sums.items()}


def percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0


def mean_statistic(values: Sequence[float | None], scale: float = 100.0) -> Callable[[Floats], float]:
    """The weighted mean of the values that there are, in percent."""
    there = np.array([value is not None for value in values], dtype=np.float64)
    numbers = np.array([value or 0.0 for value in values], dtype=np.float64)

    def statistic(weights: Floats) -> float:
        total = float((weights * there).sum())
        return scale * float((weights * numbers).sum()) / total if total else math.nan

    return statistic
