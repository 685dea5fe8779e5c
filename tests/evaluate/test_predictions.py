"""Answers in every form that is around, and their questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.evaluate.predictions import Prediction, check, match, read_predictions
from pumice.evaluate.task import Question


def read(path: Path, text: str) -> list[tuple[str, str]]:
    path.write_text(text, encoding="utf-8")
    return [(row.id, row.text) for row in read_predictions(path).rows]


@pytest.mark.parametrize(
    "value",
    [
        [{"id": "1", "prompt": "?", "answer": "x"}, {"id": "2", "answer": "y"}],
        [{"question_id": 1, "prompt": "?", "text": "x", "answer_id": "a", "model_id": "m", "metadata": {}},
         {"question_id": 2, "text": "y"}],
        [{"questionId": "1", "prediction": "x"}, {"questionId": "2", "prediction": "y"}],
        [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}],
    ],
)  # fmt: skip
def test_rows_as_lines_and_as_a_list(tmp_path: Path, value: Any) -> None:
    expected = [("1", "x"), ("2", "y")]
    assert read(tmp_path / "a", "\n".join(json.dumps(row) for row in value)) == expected
    assert read(tmp_path / "a", json.dumps(value, indent=1)) == expected


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_from_id_to_answer(tmp_path: Path, indent: int | None) -> None:
    assert read(tmp_path / "a", json.dumps({"v1_0": "x", "v1_1": "y"}, indent=indent)) == [
        ("v1_0", "x"),
        ("v1_1", "y"),
    ]


def test_broken_lines_are_counted_and_failed_questions_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(
        '{"id": 1, "answer": "x", "model": "m"}\n{"id": 2, "error": "no picture"}\n{"id": 3, "ans'
    )
    predictions = read_predictions(path)
    assert ([row.id for row in predictions.rows], predictions.broken, predictions.model) == (["1"], [3], "m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no answers"),
        ('{"id": 1}\n{"id": 2}', "row 1: no answer here"),
        ('{"answer": 1, "x": 2}\n{"answer": 1}', "row 1: no id here"),
        ('{"id": 1, "answer": null}', "'answer' is None where text is expected"),
        ("[1]", "row 1: no id here"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a").write_text(text)
    with pytest.raises(InputError, match=message):
        read_predictions(tmp_path / "a")


SHORT = "Answer the question using a single word or phrase."
QUESTIONS = [
    Question(
        "a/1",
        (),
        f"Is it red?\n{SHORT}",
        {"question": "Is it red?"},
        "7",
    ),
    Question("a/2", (), "Is it blue?", {"question": "Is it blue?"}, "7"),
    Question("b/1", (), "Is it red?", {"question": "Is it red?"}, "7"),
]


def test_answers_find_their_questions() -> None:
    rows = [
        Prediction("7", "blue", "<image>\nIs it BLUE? Please answer yes or no."),
        Prediction("a/1", "own id"),
        Prediction("7", "red once", f"Is it red?\n{SHORT}"),
        Prediction("7", "red twice", "Is it red?"),
        Prediction("9", "nobody asked"),
    ]
    matched = match(QUESTIONS, rows)
    # Equal texts under one id are taken in order: the first is the question that had an answer already.
    assert [text for _, text in matched.answered] == ["red once", "blue", "red twice"]
    assert (matched.missing, matched.unknown, matched.duplicates) == ([], ["9"], ["7"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"id": 1, "answer": "a"},', r"\(line 1, column 27: it ends too early\); a right row is \{"),
        (b'{"id": 1, "answer": "caf\xe9"}', "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_nobody_can_fetch_answers_again(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_predictions(tmp_path / "a.json")


def test_all_that_does_not_fit_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text(
        '{"id": "a/1", "answer": "x"}\n{"id": "a/1", "answer": "y"}\n{"id": "z", "answer": "x"}\n{"id"'
    )
    predictions = read_predictions(path)
    matched = match(QUESTIONS, predictions.rows)
    with pytest.raises(InputError) as caught:
        check(matched, predictions, allow_missing=False, limited=False)
    parts = (
        "2 of 3 questions have no answer (first: a/2)",
        "1 answer is to unknown questions (first: z)",
        "1 answer is to a question answered before",
        "1 line is cut off",
        "--allow-missing",
    )
    for part in parts:
        assert part in str(caught.value)
    assert len(check(matched, predictions, allow_missing=True, limited=False)) == 4
    assert [text for _, text in matched.answered] == ["y"]  # the last one counts
