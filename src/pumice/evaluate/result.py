"""From questions and answers to a result: the headline with its interval, the parts, and what is doubtful.

The result is a plain dictionary, written as JSON; docs/evaluation.md describes every key. Knows: any
Task. Does not know: how answers were made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pumice import __version__
from pumice.errors import InputError, official
from pumice.evaluate.files import ImageFile
from pumice.evaluate.metrics.bootstrap import interval_of
from pumice.evaluate.predictions import check, match, read_predictions
from pumice.evaluate.published import drift, published
from pumice.evaluate.task import Answered, Question, Score, Task, mean_statistic

LEVEL = 0.95
FORMAT = 1  # of the result


@dataclass(frozen=True)
class Asked:
    """The questions that are scored, and what is known of the official files they come from."""

    questions: list[Question]
    total: int
    known: tuple[int, ...]  # questions of this split in the versions that are known
    digest: str = ""  # of all ids, prompts and truths: the same files and prompts have the same

    @property
    def limited(self) -> bool:
        return len(self.questions) < self.total


def read_questions(task: Task, data: Path, limit: int | None = None, *, keep_images: bool = True) -> Asked:
    """The first `limit` questions of a benchmark. Raises InputError on duplicates and empty files."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; give at least 1")
    kept: list[Question] = []
    seen: set[str] = set()
    twice: list[str] = []
    total = 0
    digest = hashlib.sha256()
    for question in _questions(task, data):
        total += 1
        twice += [question.id] if question.id in seen else []
        seen.add(question.id)
        truth = question.meta.get("answers", question.meta.get("answer"))
        digest.update(json.dumps([question.id, question.prompt, truth]).encode())
        if limit is None or len(kept) < limit:
            # Pictures inside tables would otherwise all stay in memory.
            kept.append(question if keep_images else replace(question, images=_names_only(question)))
    if twice:
        raise InputError(
            f"{len(twice)} questions of {task.name} have an id that came before, the first is {twice[0]!r}; "
            "are two versions of the files in one folder?"
        )
    if not kept:
        raise InputError(f"the files of {task.name} in '{data}' hold no questions; fetch them again")
    return Asked(kept, total, task.source.known(task.split), digest.hexdigest())


def _questions(task: Task, data: Path) -> Iterator[Question]:
    """A benchmark's questions. Raises InputError also where a field is missing or of another kind."""
    number = 0
    with official(lambda: f"{task.name} in '{data}', version {task.source.version}, question {number + 1}"):
        for question in task.questions(data):
            _check_texts(question)
            yield question
            number += 1


def _check_texts(question: Question) -> None:
    meta = question.meta
    truths = meta["answers"] if "answers" in meta else [meta.get("answer") or ""]
    texts = [question.id, question.prompt, question.also, *(p.name for p in question.images), *truths]
    category = meta.get("category", "")
    texts += [] if category is None or isinstance(category, int) else [category]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{wrong[0]!r} stands where a text should")


def _names_only(question: Question) -> tuple[ImageFile, ...]:
    return tuple(ImageFile(picture.name, _forgotten) for picture in question.images)


def _forgotten() -> bytes:
    raise InputError("pictures are not kept when answers are only scored")


@dataclass(frozen=True)
class Given:
    """A file of answers, matched to the questions, in their order. notes: what did not fit."""

    answered: list[Answered]
    notes: list[str]
    model: str
    path: str


def read_answers(asked: Asked, path: Path, *, allow_missing: bool = False) -> Given:
    """Raises InputError where the answers are not exactly those to the questions, unless a part is wanted."""
    read = read_predictions(path)
    matched = match(asked.questions, read.rows)
    notes = check(matched, read, allow_missing=allow_missing, limited=asked.limited)
    return Given(matched.answered, notes, read.model or path.stem, read.path)


def make_result(
    task: Task, asked: Asked, given: Given, score: Score, reference: str | None = None
) -> dict[str, Any]:
    """The result dictionary of a score."""
    answered = given.answered
    value = score.metrics[task.headline]
    why = []
    if asked.limited:
        why.append(f"--limit {len(asked.questions)} of {asked.total} questions")
    if len(answered) < len(asked.questions):
        why.append(f"{len(asked.questions) - len(answered)} of {len(asked.questions)} questions unanswered")
    notes = given.notes + score.notes
    same = asked.total in asked.known if asked.known else None
    if same is False:
        notes.append(
            f"the files hold {asked.total} questions; {task.source.version} has "
            f"{' or '.join(map(str, asked.known))}: another version, not comparable with published numbers"
        )
    comparable = not why and same is True
    low, high = _interval(task, answered, score)
    return {
        "format": FORMAT,
        "pumice": __version__,
        "task": task.name,
        "title": task.title,
        "split": task.split,
        "model": given.model,
        "predictions": given.path,
        "headline": {
            "name": task.headline,
            "value": _number(value),
            "unit": task.unit,
            "interval": None if low is None else [_number(low), _number(high)],
            "level": LEVEL,
        },
        "metrics": {name: _number(number) for name, number in score.metrics.items()},
        "categories": {
            title: {
                name: {"value": _number(cell.value), "questions": cell.count} for name, cell in cells.items()
            }
            for title, cells in score.categories.items()
        },
        "questions": asked.total,
        "answered": len(answered),
        "partial": bool(why),
        "why_partial": "; ".join(why),
        "version": {
            "known": task.source.version,
            "questions": asked.total,
            "expected": list(asked.known),
            "same": same,
            "digest": asked.digest,
        },
        "comparable": comparable,
        "published": published(task.name),
        "drift": drift(task.name, value, reference, comparable=comparable) if reference else {},
        "judge": score.judge,
        "notes": notes,
    }


def _interval(task: Task, answered: Sequence[Answered], score: Score) -> tuple[float | None, float | None]:
    statistic = score.statistic or mean_statistic(score.values)
    groups = [question.group for question, _ in answered]
    if len(set(groups)) < 2:
        return None, None
    # Sums over long lists of weights are the cost; a tenth of a million questions gets fewer draws.
    samples = 1000 if len(answered) <= 20_000 else 200
    low, high = interval_of(statistic, groups, level=LEVEL, samples=samples)
    return (None, None) if math.isnan(low) else (low, high)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 6)


def read_result(path: Path) -> dict[str, Any]:
    """A result that `pumice eval --json` wrote. Raises InputError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the result '{path}' cannot be read ({error}); write it with --json") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "headline" not in found:
        raise InputError(f"'{path}' is not a result of pumice eval, format {FORMAT}; write it with --json")
    return found


def in_words(found: Mapping[str, Any], rows: int = 40) -> str:
    """A result for the terminal."""
    head = found["headline"]
    percent = "%" if head["unit"] == "%" else ""
    interval = head["interval"]
    label = "  PARTIAL: " + found["why_partial"] if found["partial"] else ""
    value = "not scored" if head["value"] is None else f"{head['value']:.2f}{percent}"
    line = f"{found['title']} ({found['split']}), {found['model']}: {head['name']} {value}"
    if interval:
        line += f"  [{interval[0]:.2f}, {interval[1]:.2f}]"
    lines = [line + label]
    for name, value in islice(found["metrics"].items(), rows):
        if name != head["name"] and value is not None:
            lines.append(f"  {name:<28} {value:10.2f}")
    for title, cells in found["categories"].items():
        lines.append(f"  by {title}")
        for name, cell in islice(cells.items(), rows):
            lines.append(f"    {name:<26} {cell['value']:10.2f}  {cell['questions']} questions")
        if len(cells) > rows:
            lines.append(f"    ... {len(cells) - rows} more with --json")
    for model, number in found["published"].items():
        lines.append(f"  published {model:<18} {number:10.2f}")
    if found["drift"].get("drifted"):
        drifted = found["drift"]
        lines.append(
            f"  DRIFT: {drifted['difference']:+.2f} from {drifted['reference']}, "
            f"more than retraining makes ({drifted['spread']:g})"
        )
    lines += [f"  note: {note}" for note in found["notes"]]
    return "\n".join(lines)
