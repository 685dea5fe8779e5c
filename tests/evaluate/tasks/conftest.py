"""Small folders in the official layouts, and scoring them as the command line does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pumice.evaluate.result import make_result, read_answers, read_questions
from pumice.evaluate.tasks import get_task


class Folder:
    """The folder of a benchmark's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def text(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(value, ensure_ascii=False))

    def lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """scored(task, answers): the result for {id: answer}, or for rows of LLaVA's, on the data."""

    def score(
        name: str,
        answers: Mapping[Any, str] | list[dict[str, Any]],
        split: str | None = None,
        task: Any = None,
        limit: int | None = None,
        allow_missing: bool = False,
    ) -> dict[str, Any]:
        rows = answers if isinstance(answers, list) else [{"id": k, "answer": v} for k, v in answers.items()]
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        chosen = task or get_task(name, split)
        questions = read_questions(chosen, tmp_path / "data", limit, keep_images=False)
        answers = read_answers(questions, path, allow_missing=allow_missing)
        return make_result(chosen, questions, answers, chosen.score(answers.answered))

    return score


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """asked(task): the questions of the data by id."""
    return lambda name, split=None: {q.id: q for q in get_task(name, split).questions(tmp_path / "data")}
