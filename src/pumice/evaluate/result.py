"""Score answers and build the result: the headline with its interval, scores by category, and notes.

The result is a plain dictionary, written as JSON; docs/evaluation.md describes every key.
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

import numpy as np

from pumice import __version__
from pumice.errors import CAUSE, InputError, counted, official, wrong_input
from pumice.evaluate.files import ImageFile
from pumice.evaluate.metrics.bootstrap import interval_of
from pumice.evaluate.predictions import check, match, read_predictions
from pumice.evaluate.published import drift
from pumice.evaluate.task import Answered, Question, Score, Task, mean_statistic
from pumice.jsonl import wrong_json

LEVEL = 0.95
FORMAT = 1  # of the result
ROWS = 40  # of a table in the terminal


@dataclass(frozen=True)
class QuestionSet:
    """The questions to score, and how many questions the official files hold."""

    questions: list[Question]
    total: int  # questions in the files, before --limit
    known_sizes: tuple[int, ...]  # number of questions of this split in each published version
    digest: str = ""  # SHA-256 of all ids, prompts and truths; equal files and prompts have equal digests

    @property
    def limited(self) -> bool:
        return len(self.questions) < self.total


def read_questions(
    task: Task, data: Path, limit: int | None = None, *, keep_images: bool = True
) -> QuestionSet:
    """Read the first `limit` questions of a benchmark. Raises InputError on duplicates and empty files.

    keep_images: False drops images stored inside tables, which only a model needs.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; give at least 1")
    selected: list[Question] = []
    ids: set[str] = set()
    duplicate_ids: list[str] = []
    total = 0
    digest = hashlib.sha256()
    for question in _questions(task, data):
        total += 1
        duplicate_ids += [question.id] if question.id in ids else []
        ids.add(question.id)
        truth = question.meta.get("answers", question.meta.get("answer"))
        digest.update(json.dumps([question.id, question.prompt, truth]).encode())
        if limit is None or len(selected) < limit:
            if not keep_images:  # those inside tables would otherwise all stay in memory
                names = tuple(ImageFile(image.name, _not_kept) for image in question.images)
                question = replace(question, images=names)
            selected.append(question)
    if duplicate_ids:
        raise InputError(
            f"{counted(len(duplicate_ids), 'question')} of {task.name} had an id that came before, "
            f"the first is {duplicate_ids[0]!r}; "
            + ("give each row another id" if task.example else "are two versions of the files in one folder?")
        )
    if not selected:
        if task.example:
            raise InputError(f"'{data}' holds no questions; write one row per line, such as {task.example}")
        raise InputError(f"the files of {task.name} in '{data}' hold no questions; fetch them again")
    return QuestionSet(selected, total, task.source.known_sizes(task.split), digest.hexdigest())


def _questions(task: Task, data: Path) -> Iterator[Question]:
    """Yield a benchmark's questions. Raises InputError where a field is missing or has another type."""
    number = 0

    def describe() -> str:
        if task.example:
            return f"'{data}', row {number + 1}"
        return f"{task.name} in '{data}', version {task.source.version}, question {number + 1}"

    with official(describe, task.example):
        for question in task.questions(data):
            _check_texts(question)
            yield question
            number += 1


def _check_texts(question: Question) -> None:
    meta = question.meta
    truths = meta["answers"] if "answers" in meta else [meta.get("answer") or ""]
    names = [image.name for image in question.images]
    texts = [question.id, question.prompt, question.llava_id, *names, *truths]
    category = meta.get("category", "")
    texts += [] if category is None or isinstance(category, int) else [category]
    if not_texts := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{not_texts[0]!r} stands where a text should")


def _not_kept() -> bytes:
    raise InputError("pictures are not kept when answers are only scored")


@dataclass(frozen=True)
class AnswerSet:
    """The answers of one file, matched to the questions and in their order. notes: what did not match."""

    answered: list[Answered]
    notes: list[str]
    model: str
    path: str


def read_answers(questions: QuestionSet, path: Path, *, allow_missing: bool = False) -> AnswerSet:
    """Read a file of answers and match them to the questions.

    Raises InputError where answers are missing, duplicate, unknown or broken, unless `allow_missing`.
    """
    predictions = read_predictions(path)
    matched = match(questions.questions, predictions.rows)
    notes = check(matched, predictions, allow_missing=allow_missing, limited=questions.limited)
    return AnswerSet(matched.answered, notes, predictions.model or path.stem, predictions.path)


def make_result(
    task: Task, questions: QuestionSet, answers: AnswerSet, score: Score, reference: str | None = None
) -> dict[str, Any]:
    """Build the result dictionary of a score.

    reference: a model whose published number the headline should reach, such as "LLaVA-1.5-7B".
    """
    answered = answers.answered
    value = score.metrics[task.headline]
    # 1. Say why the score is partial: only whole splits compare with published numbers.
    reasons = []
    selected = len(questions.questions)
    if questions.limited:
        reasons.append(f"--limit {counted(selected, 'question', of=questions.total)}")
    if len(answered) < selected:
        reasons.append(f"{counted(selected - len(answered), 'question', of=selected)} unanswered")
    # 2. Compare the number of questions with the published versions: another version has other numbers.
    notes = answers.notes + score.notes
    same = questions.total in questions.known_sizes if questions.known_sizes else None
    if same is False:
        notes.append(
            f"the files hold {counted(questions.total, 'question')}; {task.source.version} has "
            f"{' or '.join(map(str, questions.known_sizes))}: another version, "
            "not comparable with published numbers"
        )
    comparable = not reasons and same is True
    # 3. Resample images, because the questions about one image are not independent.
    low, high = _interval(answered, score, value)
    several = len({question.group for question, _ in answered}) > 1
    if low is None and several and math.isfinite(value):
        notes.append(
            f"no interval: {task.headline} is not the mean of the answers' scores, and the benchmark gives "
            "no `statistic` that computes it"
        )
    return {
        "format": FORMAT,
        "pumice": __version__,
        "task": task.name,
        "title": task.title,
        "split": task.split,
        "model": answers.model,
        "predictions": answers.path,
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
        "questions": questions.total,
        "answered": len(answered),
        "partial": bool(reasons),
        "why_partial": "; ".join(reasons),
        "version": {
            "known": task.source.version,
            "questions": questions.total,
            "expected": list(questions.known_sizes),
            "same": same,
            "digest": questions.digest,
        },
        "comparable": comparable,
        "published": dict(task.source.published),
        "drift": drift(task.source, value, reference, comparable=comparable) if reference else {},
        "judge": score.judge,
        "notes": notes,
    }


def _interval(
    answered: Sequence[Answered], score: Score, headline: float
) -> tuple[float | None, float | None]:
    """Return the interval of the headline, or None where its statistic is unknown."""
    statistic = score.statistic or mean_statistic(score.values)
    groups = [question.group for question, _ in answered]
    if len(set(groups)) < 2:
        return None, None
    # With every question drawn once, the statistic must give the headline: else it is another number's.
    if not math.isclose(statistic(np.ones(len(groups))), headline, rel_tol=1e-6, abs_tol=1e-6):
        return None, None
    # Each sample sums over all questions, so a split of 100,000 questions gets fewer samples.
    samples = 1000 if len(answered) <= 20_000 else 200
    low, high = interval_of(statistic, groups, level=LEVEL, samples=samples)
    return (None, None) if math.isnan(low) else (low, high)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 6)


def read_result(path: Path) -> dict[str, Any]:
    """Read a result that `pumice eval --json` wrote. Raises InputError where the file holds none."""
    sentence = f"the result '{path}' cannot be read ({CAUSE}); write it with --json"
    with wrong_json(sentence), wrong_input(OSError, sentence):
        result = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(result, dict) or result.get("format") != FORMAT or "headline" not in result:
        raise InputError(f"'{path}' is not a result of pumice eval, format {FORMAT}; write it with --json")
    return result


def format_result(result: Mapping[str, Any]) -> str:
    """Return a result as text for the terminal, with at most ROWS lines of each table."""
    head = result["headline"]
    percent = "%" if head["unit"] == "%" else ""
    interval = head["interval"]
    label = "  PARTIAL: " + result["why_partial"] if result["partial"] else ""
    value = "not scored" if head["value"] is None else f"{head['value']:.2f}{percent}"
    line = f"{result['title']} ({result['split']}), {result['model']}: {head['name']} {value}"
    if interval:
        line += f"  [{interval[0]:.2f}, {interval[1]:.2f}]"
    lines = [line + label]
    metrics = {
        n: v for n, v in islice(result["metrics"].items(), ROWS) if n != head["name"] and v is not None
    }
    width = max(map(len, metrics), default=0)
    lines += [f"  {name:<{width}} {value:10.2f}" for name, value in metrics.items()]
    for title, cells in result["categories"].items():
        lines.append(f"  by {title}")
        shown = dict(islice(cells.items(), ROWS))
        width = max(map(len, shown), default=0)
        for name, cell in shown.items():
            lines.append(
                f"    {name:<{width}} {cell['value']:10.2f}  {counted(cell['questions'], 'question')}"
            )
        if len(cells) > ROWS:
            lines.append(f"    ... {len(cells) - ROWS} more with --json")
    for model, number in result["published"].items():
        lines.append(f"  published {model:<18} {number:10.2f}")
    if result["drift"].get("drifted"):
        drifted = result["drift"]
        lines.append(
            f"  DRIFT: {drifted['difference']:+.2f} from {drifted['reference']}, "
            f"more than retraining makes ({drifted['spread']:g})"
        )
    lines += [f"  note: {note}" for note in result["notes"]]
    return "\n".join(lines)
