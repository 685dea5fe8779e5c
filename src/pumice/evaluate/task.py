"""Define what a benchmark is: a `Task` turns official files into questions and scores the answers.

Each benchmark is one class in `tasks/`; `pumice.evaluate.tasks.registry` finds it there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pumice.boxes import FORMS, BoxMap, box_map
from pumice.config import ModelConfig
from pumice.errors import InputError, counted
from pumice.evaluate.files import DataFile, ImageFile, locate, read_rows
from pumice.geometry import Size
from pumice.storage.yaml_file import read_yaml

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """One question. Its prompt is the text after the images, without the chat template.

    meta: the truth and whatever the score needs. Two keys have the same meaning in every benchmark:
    "category", and "group" (questions that the bootstrap draws together). llava_id: the id in LLaVA's
    question files where it differs; questions that share it are told apart by their text.
    """

    id: str
    images: tuple[ImageFile, ...]
    prompt: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    llava_id: str = ""

    @property
    def group(self) -> str:
        """The key of questions that are resampled together: by default those about one image."""
        return str(self.meta.get("group") or (self.images[0].name if self.images else self.id))


class Answered(NamedTuple):
    """A question and the model's answer to it."""

    question: Question
    text: str  # unchanged


@dataclass(frozen=True)
class CategoryScore:
    """The score of one category, in the unit of the headline, and its number of questions."""

    value: float
    count: int


@dataclass
class Score:
    """The scores of a set of answers.

    metrics: name -> number, the headline among them. categories: title -> category -> its score.
    values: the score of each answer, 0 to 1; None where an answer has no score of its own.
    statistic: computes the headline from how often each question was drawn (weights); None means the
    mean of `values`. judge: which judge replied, and how often; empty without a judge.
    """

    metrics: dict[str, float]
    categories: dict[str, dict[str, CategoryScore]] = field(default_factory=dict)
    values: list[float | None] = field(default_factory=list)
    statistic: Callable[[Floats], float] | None = None
    notes: list[str] = field(default_factory=list)
    judge: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetSource:
    """A benchmark's official release, and LLaVA's numbers; benchmarks.yaml says what the fields mean."""

    url: str
    version: str
    licence: str
    files: Sequence[str]
    sizes: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    elsewhere: str = ""
    spread: float = 1.0
    scale: float = 100.0

    @property
    def expected_files(self) -> str:
        return ", ".join(self.files)

    def known_sizes(self, split: str) -> tuple[int, ...]:
        """Return the number of questions of a split in each published version; empty if unknown."""
        size = self.sizes.get(split, ())
        return (size,) if isinstance(size, int) else tuple(size)


@cache
def releases() -> dict[str, DatasetSource]:
    """Return the official release of each benchmark by its name, the twelve of LLaVA-1.5 first."""
    table = read_yaml(Path(__file__).parent / "benchmarks.yaml", "table of benchmarks")
    return {name: DatasetSource(**values) for name, values in table.items()}


class Task(ABC):
    """A benchmark. To add one, write a file in tasks/ with a subclass that sets these names."""

    name: ClassVar[str]
    title: ClassVar[str]
    headline: ClassVar[str] = "accuracy"  # a key of Score.metrics
    unit: ClassVar[str] = "%"
    lower_is_better: ClassVar[bool] = False  # of the headline; in Score.values higher is always better
    source: ClassVar[DatasetSource]  # that of benchmarks.yaml if the class has none
    max_new_tokens: ClassVar[int] = 128
    example: ClassVar[str] = ""  # a right row, where the user writes the file; else the file is official
    has_boxes: ClassVar[bool] = False  # whether answers may hold boxes, which models write in several forms
    splits: ClassVar[tuple[str, ...]]  # first: the published split that has public answers

    def __init_subclass__(cls) -> None:
        if (name := vars(cls).get("name")) in releases():
            cls.source = releases()[name]
        if name and "splits" not in vars(cls):
            cls.splits = tuple(cls.source.sizes) or ("test",)

    def __init__(self, split: str | None = None) -> None:
        if split is not None and split not in self.splits:
            raise InputError(f"{self.name} has no split {split!r}; use one of {', '.join(self.splits)}")
        self.split = split or self.splits[0]
        # How answers write boxes; and the model that gives them, which the form "pixels" depends on.
        self.box_form = "padded"
        self.box_model: ModelConfig | None = None

    def box_map(self, size: Size, images: int = 1) -> BoxMap:
        """Return the map of a picture's boxes as answers write them.

        size: (width, height). images: how many the question has.
        """
        if self.box_model is None:
            return BoxMap(FORMS[self.box_form], size)
        return box_map(replace(self.box_model, boxes=self.box_form), size, images)

    def box_note(self) -> str:
        """Return a note on how the boxes of answers were read."""
        return f"boxes are read in the form {self.box_form!r}; --boxes names another"

    def locate(self, data: Path, *names: str) -> DataFile:
        """Return the first official file of `names` in folder `data`. Raises InputError without one."""
        return locate(data, names, self.source.expected_files)

    def rows(
        self, data: Path, *names: str, keys: Sequence[str], at: str = "", texts: Collection[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of an official file (see `read_rows`)."""
        return read_rows(self.locate(data, *names), *keys, at=at, texts=texts)

    def not_public(self, server: str = "", file: str = "FILE") -> InputError:
        """Return the error of a split whose answers only the benchmark's server has."""
        upload = f"write --submission {file} and upload it to {server}, or " if server else ""
        return InputError(
            f"the answers of {self.title} {self.split} are not public; {upload}score --split {self.splits[0]}"
        )

    @abstractmethod
    def questions(self, data: Path) -> Iterator[Question]:
        """Yield the questions of the official files in folder `data`, in file order. Raises InputError."""

    @abstractmethod
    def score(self, answered: Sequence[Answered]) -> Score:
        """Score answers in the order of the questions. Raises InputError if the truth is not public."""

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write the file that the benchmark's server or official script reads. Raises InputError."""
        raise InputError(f"{self.name} has no server to submit to; it is scored here")


def mean_score(
    answered: Sequence[Answered],
    metrics: Mapping[str, Sequence[float]],
    categories: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Score:
    """Return means in percent. metrics: name -> the score of each answer; the first is the headline's.

    categories: title -> the key of Question.meta by which the headline is split.
    """
    values = next(iter(metrics.values()))
    cells = {title: scores_by_category(answered, values, key) for title, key in (categories or {}).items()}
    return Score({k: mean_percent(v) for k, v in metrics.items()}, cells, list(values), notes=list(notes))


def scores_by_category(
    answered: Sequence[Answered], values: Sequence[float | None], key: str
) -> dict[str, CategoryScore]:
    """Return the mean of `values` in percent for each meta[key], in order of appearance.

    meta[key] may be a list of several. An answer without a value is in no mean; a mean of none is nan.
    """
    values_by_name: dict[str, list[float]] = {}
    for (question, _), value in zip(answered, values, strict=True):
        names = question.meta.get(key)
        for name in names if isinstance(names, list) else [names]:
            if name is not None:
                values_by_name.setdefault(str(name), []).extend([] if value is None else [value])
    return {
        name: CategoryScore(mean_percent(scores) if scores else math.nan, len(scores))
        for name, scores in values_by_name.items()
    }


def options_note(answered: Sequence[Answered]) -> list[str]:
    """Return a note if options were shown that official scripts hide: pandas reads "None" as no value."""
    count = sum(question.meta["hidden"] > 0 for question, _ in answered)
    if not count:
        return []
    return [
        f'{counted(count, "question", "have")} an option such as "None", which is shown here; scripts '
        "that read the table with pandas hide it, so their numbers differ"
    ]


def add_unread(score: Score, count: int, outcome: str) -> None:
    """Add how many answers no rule reads, as a metric and in a note.

    outcome: in the plural, "name no option, which counts as wrong", say.
    """
    score.metrics["unread"] = score.metrics.get("unread", 0.0) + count
    if count:
        score.notes.append(counted(count, "answer", outcome))


def mean_percent(values: Sequence[float]) -> float:
    """Return the mean in percent; 0 without values."""
    return 100 * sum(values) / len(values) if values else 0.0


def mean_statistic(values: Sequence[float | None], scale: float = 100.0) -> Callable[[Floats], float]:
    """Return a function of weights: the weighted mean, times `scale`, of the values that are not None."""
    has_value = np.array([value is not None for value in values], dtype=np.float64)
    numbers = np.array([value or 0.0 for value in values], dtype=np.float64)

    def statistic(weights: Floats) -> float:
        total = float((weights * has_value).sum())
        return scale * float((weights * numbers).sum()) / total if total else math.nan

    return statistic
