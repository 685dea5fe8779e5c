"""Files of answers: read in every form that is around, and matched to a benchmark's questions.

Knows: our predictions.jsonl, LLaVA's answer files, what the servers take. Does not know: right and wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pumice.errors import InputError
from pumice.evaluate.files import DataFile, read_json, read_lines
from pumice.evaluate.task import Answered, Question

_IDS = ("id", "question_id", "questionId", "image_id", "index", "image")
# Where a row also holds the truth it is called "answer", so that comes late.
_TEXTS = ("prediction", "response", "text", "caption", "answer", "output")
# How much of a prompt is the same for all questions of a benchmark and says nothing of which it is.
_COMMON = re.compile(
    r"<image>|please answer yes or no\.?|answer the question using a single word or phrase\.?", re.IGNORECASE
)
_PICTURE_NAME = re.compile(r"\.(jpg|jpeg|png)$", re.IGNORECASE)


@dataclass(frozen=True)
class Prediction:
    id: str
    text: str
    prompt: str = ""
    category: str = ""


@dataclass
class Predictions:
    """The answers of one file, in order, and the lines that could not be read."""

    path: str
    rows: list[Prediction]
    broken: list[int] = field(default_factory=list)
    model: str = ""


def read_predictions(path: Path) -> Predictions:
    """JSON Lines or JSON: rows with an id and an answer, or one object from id to answer.

    Raises InputError when there is no answer in it. Broken lines are counted, not an error yet.
    """
    file = DataFile(path)
    text = file.text().lstrip()
    if not text:
        raise InputError(f"'{path}' holds no answers; write one JSON object per line")
    broken: list[int] = []
    if text.startswith("["):
        values = read_json(file)
    else:
        values, broken = read_lines(file)
        if len(broken) > len(values) and text.startswith("{"):  # one object over several lines
            values, broken = [read_json(file)], []
        if len(values) == 1 and not any(key in values[0] for key in _IDS):
            values = [{"id": key, "answer": answer} for key, answer in values[0].items()]
    rows, model = [], ""
    for number, row in enumerate(values, 1):
        if isinstance(row, dict) and "error" in row and not any(key in row for key in _TEXTS):
            continue  # of our own: a question that could not be asked has no answer
        rows.append(_prediction(row, f"'{path}', row {number}"))
        if not model and isinstance(row.get("model_id", row.get("model")), str):
            model = row.get("model_id", row.get("model"))
    if not rows:
        raise InputError(f"'{path}' holds no answers; {len(broken)} of its lines are broken")
    return Predictions(str(path), rows, broken, model)


def _prediction(row: Any, where: str) -> Prediction:
    key = next((k for k in _IDS if isinstance(row, dict) and k in row), None)
    text = next((k for k in _TEXTS if isinstance(row, dict) and k in row), None)
    if key is None or text is None:
        raise InputError(
            f"{where}: no {'id' if key is None else 'answer'} here; write 'id' and 'answer', "
            "or 'question_id' and 'text' as LLaVA does"
        )
    said = row[text]
    if isinstance(said, bool) or not isinstance(said, str | int | float):
        raise InputError(f"{where}: '{text}' is {said!r} where text is expected")
    return Prediction(
        str(row[key]),
        str(said),
        str(row.get("prompt") or row.get("question") or ""),
        str(row.get("category", "")),
    )


@dataclass
class MatchedAnswers:
    """answered: in the order of the questions. The rest says what did not fit."""

    answered: list[Answered]
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)


def match(questions: Sequence[Question], rows: Iterable[Prediction]) -> MatchedAnswers:
    """Each answer to its question, by the question's id, else by its id in LLaVA's files and its text.

    Of several answers to one question the last counts, as in LLaVA's scripts.
    """
    by_id = {question.id: number for number, question in enumerate(questions)}
    by_other: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        if question.llava_id:
            by_other.setdefault(question.llava_id, []).append(number)
    result = MatchedAnswers([])
    texts: dict[int, str] = {}
    used: dict[tuple[str, str], int] = {}
    for row in rows:
        place = by_id.get(row.id, by_id.get(f"{row.category}/{row.id}"))
        if place is None:
            shared = by_other.get(row.id) or by_other.get(_PICTURE_NAME.sub("", row.id))
            place = _among(questions, shared, row, used) if shared else None
        if place is None:
            result.unknown.append(row.id)
            continue
        if place in texts:
            result.duplicates.append(row.id)
        texts[place] = row.text
    for number, question in enumerate(questions):
        if number in texts:
            result.answered.append(Answered(question, texts[number]))
        else:
            result.missing.append(question.id)
    return result


def _among(
    questions: Sequence[Question],
    numbers: list[int],
    row: Prediction,
    used: dict[tuple[str, str], int],
) -> int | None:
    """Which of the questions that share an id is answered: the one with the text, the next one of equals."""
    if len(numbers) == 1:
        return numbers[0]
    asked = _words(row.prompt)
    same = [n for n in numbers if _words(questions[n].prompt) == asked]
    if not same:
        lines = [_words(line) for line in row.prompt.split("\n")]
        same = [n for n in numbers if _words(_own_text(questions[n])) in lines]
    if not same:
        same = [n for n in numbers if (words := _words(_own_text(questions[n]))) and words in asked]
    if not same and not asked:
        same = numbers  # nothing to tell them apart but their order
    if not same:
        return None
    key = (row.id, asked)
    place = used.get(key, 0)
    used[key] = place + 1
    return same[place % len(same)]


def _own_text(question: Question) -> str:
    return str(question.meta.get("question") or question.prompt)


def _words(text: str) -> str:
    return " ".join(_COMMON.sub(" ", text).lower().split())


def check(
    matched: MatchedAnswers, predictions: Predictions, *, allow_missing: bool, limited: bool
) -> list[str]:
    """What is wrong with a set of answers, as notes. Raises InputError unless it is allowed.

    limited: only the first questions are scored, so that answers to others are no fault.
    """
    total = len(matched.answered) + len(matched.missing)
    found: list[tuple[str, Sequence[Any]]] = [
        (f"{len(matched.missing)} of {total} questions have no answer", matched.missing),
        (f"{len(matched.duplicates)} answers are to a question answered before", matched.duplicates),
        (f"{len(predictions.broken)} lines are cut off or not JSON", predictions.broken),
    ]
    if not limited:
        found.insert(1, (f"{len(matched.unknown)} answers are to unknown questions", matched.unknown))
    problems = [f"{text} (first: {which[0]})" for text, which in found if which]
    if problems and not allow_missing:
        raise InputError(
            f"'{predictions.path}': {'; '.join(problems)}; complete it, "
            "or add --allow-missing to score what fits, marked as partial"
        )
    if not matched.answered:
        raise InputError(
            f"'{predictions.path}' answers none of the {total} questions; is it of another task?"
        )
    return problems
