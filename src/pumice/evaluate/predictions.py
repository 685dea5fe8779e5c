"""Read files of answers and match them to a benchmark's questions.

Formats: Pumice's predictions.jsonl, LLaVA's answer files, and the files that the benchmarks' servers take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pumice.errors import InputError, counted
from pumice.evaluate.files import DataFile, read_json, read_lines
from pumice.evaluate.task import Answered, Question

_IDS = ("id", "question_id", "questionId", "image_id", "index", "image")
# Rows that also hold the truth call it "answer", so the more specific names come first.
_TEXTS = ("prediction", "response", "text", "caption", "answer", "output")
# Parts of a prompt that all questions of a benchmark share; they do not identify a question.
_COMMON = re.compile(
    r"<image>|please answer yes or no\.?|answer the question using a single word or phrase\.?", re.IGNORECASE
)
_IMAGE_SUFFIX = re.compile(r"\.(jpg|jpeg|png)$", re.IGNORECASE)


@dataclass(frozen=True)
class Prediction:
    """One row of a file of answers; prompt and category are empty where the row has none."""

    id: str
    text: str
    prompt: str = ""
    category: str = ""


@dataclass
class Predictions:
    """The answers of one file, in order."""

    path: str
    rows: list[Prediction]
    broken: list[int] = field(default_factory=list)  # numbers of the lines that cannot be read
    model: str = ""


def read_predictions(path: Path) -> Predictions:
    """Read JSON Lines or JSON: rows with an id and an answer, or one object that maps ids to answers.

    Raises InputError when the file holds no answer. Broken lines are listed; `check` refuses them.
    """
    # 1. Find out which of the forms the file has.
    file = DataFile(path, example='{"id": "1", "answer": "a dog"}')
    text = file.text().lstrip()
    if not text:
        raise InputError(f"'{path}' holds no answers; write one JSON object per line")
    broken: list[int] = []
    if text.startswith("["):
        values = read_json(file)
    else:
        values, broken = read_lines(file)
        if len(broken) > len(values) and text.startswith("{"):  # one object, spread over several lines
            values, broken = [read_json(file)], []
        if len(values) == 1 and not any(key in values[0] for key in _IDS):
            values = [{"id": key, "answer": answer} for key, answer in values[0].items()]
    # 2. Read the rows; a row with only "error" is a question that could not be asked.
    rows, model = [], ""
    for number, row in enumerate(values, 1):
        if isinstance(row, dict) and "error" in row and not any(key in row for key in _TEXTS):
            continue
        rows.append(_prediction(row, f"'{path}', row {number}"))
        if not model and isinstance(row.get("model_id", row.get("model")), str):
            model = row.get("model_id", row.get("model"))
    if not rows:
        raise InputError(f"'{path}' holds no answers; {counted(len(broken), 'line', 'are')} broken")
    return Predictions(str(path), rows, broken, model)


def _prediction(row: Any, error_prefix: str) -> Prediction:
    id_key = next((k for k in _IDS if isinstance(row, dict) and k in row), None)
    text_key = next((k for k in _TEXTS if isinstance(row, dict) and k in row), None)
    if id_key is None or text_key is None:
        raise InputError(
            f"{error_prefix}: no {'id' if id_key is None else 'answer'} here; write 'id' and 'answer', "
            "or 'question_id' and 'text' as LLaVA does"
        )
    text = row[text_key]
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise InputError(f"{error_prefix}: '{text_key}' is {text!r} where text is expected")
    return Prediction(
        str(row[id_key]),
        str(text),
        str(row.get("prompt") or row.get("question") or ""),
        str(row.get("category", "")),
    )


@dataclass
class MatchedAnswers:
    """The answers in the order of the questions, and the ids of what did not match."""

    answered: list[Answered]
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)


def match(questions: Sequence[Question], rows: Iterable[Prediction]) -> MatchedAnswers:
    """Match each answer to its question by the question's id, else by its id in LLaVA's files and its text.

    The last of several answers to one question counts, as in LLaVA's scripts.
    """
    # 1. Index the questions by both ids; LLaVA's id may belong to several questions.
    by_id = {question.id: number for number, question in enumerate(questions)}
    by_llava_id: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        if question.llava_id:
            by_llava_id.setdefault(question.llava_id, []).append(number)
    result = MatchedAnswers([])
    texts: dict[int, str] = {}  # by the question's index
    uses: dict[tuple[str, str], int] = {}
    # 2. Find the question of each answer.
    for row in rows:
        index = by_id.get(row.id, by_id.get(f"{row.category}/{row.id}"))
        if index is None:
            candidates = by_llava_id.get(row.id) or by_llava_id.get(_IMAGE_SUFFIX.sub("", row.id))
            index = _choose(questions, candidates, row, uses) if candidates else None
        if index is None:
            result.unknown.append(row.id)
            continue
        if index in texts:
            result.duplicates.append(row.id)
        texts[index] = row.text
    # 3. Put the answers into the order of the questions.
    for number, question in enumerate(questions):
        if number in texts:
            result.answered.append(Answered(question, texts[number]))
        else:
            result.missing.append(question.id)
    return result


def _choose(
    questions: Sequence[Question], candidates: list[int], row: Prediction, uses: dict[tuple[str, str], int]
) -> int | None:
    """Choose, among questions that share an id, the one whose text is in the prompt of the answer.

    Questions with equal texts are taken in turn; `uses` counts the turns. None if no text fits.
    """
    if len(candidates) == 1:
        return candidates[0]
    # Compare the whole prompt first, then its lines, then any part: the strictest rule that fits wins.
    prompt = _words(row.prompt)
    matches = [n for n in candidates if _words(questions[n].prompt) == prompt]
    if not matches:
        lines = [_words(line) for line in row.prompt.split("\n")]
        matches = [n for n in candidates if _words(_question_text(questions[n])) in lines]
    if not matches:
        matches = [n for n in candidates if (text := _words(_question_text(questions[n]))) and text in prompt]
    if not matches and not prompt:
        matches = candidates  # without a prompt only the order is left
    if not matches:
        return None
    key = (row.id, prompt)
    turn = uses.get(key, 0)
    uses[key] = turn + 1
    return matches[turn % len(matches)]


def _question_text(question: Question) -> str:
    return str(question.meta.get("question") or question.prompt)


def _words(text: str) -> str:
    return " ".join(_COMMON.sub(" ", text).lower().split())


def check(
    matched: MatchedAnswers, predictions: Predictions, *, allow_missing: bool, limited: bool
) -> list[str]:
    """Return what is wrong with a set of answers, as notes. Raises InputError unless `allow_missing`.

    limited: only the first questions are scored, so answers to other questions are allowed.
    """
    total = len(matched.answered) + len(matched.missing)
    unknown = [] if limited else matched.unknown
    checks: list[tuple[str, Sequence[Any]]] = [
        (f"{counted(len(matched.missing), 'question', 'have', of=total)} no answer", matched.missing),
        (f"{counted(len(unknown), 'answer', 'are')} to unknown questions", unknown),
        (
            f"{counted(len(matched.duplicates), 'answer', 'are')} to a question answered before",
            matched.duplicates,
        ),
        (f"{counted(len(predictions.broken), 'line', 'are')} cut off or not JSON", predictions.broken),
    ]
    problems = [f"{text} (first: {items[0]})" for text, items in checks if items]
    if problems and not allow_missing:
        raise InputError(
            f"'{predictions.path}': {'; '.join(problems)}; complete it, "
            "or add --allow-missing to score what fits, marked as partial"
        )
    if not matched.answered:
        raise InputError(
            f"'{predictions.path}' answers none of {counted(total, 'question')}; is it of another task?"
        )
    return problems
