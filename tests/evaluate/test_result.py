"""Results: intervals, what makes them partial, drift, and the words of the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError, counted
from pumice.evaluate.files import write_json
from pumice.evaluate.published import drift
from pumice.evaluate.result import format_result, make_result, read_answers, read_questions, read_result
from pumice.evaluate.task import releases
from pumice.evaluate.tasks import get_task


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Ten questions about five pictures, answered; every second answer is right."""
    rows = [{"id": n, "image": f"{n // 2}.png", "question": f"Q{n}?", "answers": "yes"} for n in range(10)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"id": n, "answer": "yes" if n % 2 else "no", "model": "m"} for n in range(10)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return tmp_path


def score(files: Path, limit: int | None = None, *, allow_missing: bool = False) -> dict[str, Any]:
    task = get_task("own")
    questions = read_questions(task, files, limit)
    answers = read_answers(questions, files / "answers.jsonl", allow_missing=allow_missing)
    return make_result(task, questions, answers, task.score(answers.answered))


def test_a_whole_result(files: Path) -> None:
    result = score(files)
    # One of two answers is right for every picture: whatever pictures are drawn, it stays one half.
    assert result["headline"] == {
        "name": "score",
        "value": 50,
        "unit": "%",
        "interval": [50, 50],
        "level": 0.95,
    }
    assert (result["model"], result["partial"], result["answered"]) == ("m", False, 10)
    assert result["version"]["digest"] == score(files, limit=2)["version"]["digest"]
    write_json(files / "r.json", result)
    assert read_result(files / "r.json") == result
    assert format_result(result).startswith("Your own file (all), m: score 50.00%  [50.00, 50.00]\n")


def test_a_limit_is_partial_everywhere(files: Path) -> None:
    result = score(files, limit=3)
    assert result["headline"]["value"] == pytest.approx(100 / 3)
    assert result["partial"]
    assert result["why_partial"] == "--limit 3 of 10 questions"
    assert not result["comparable"]
    assert "PARTIAL: --limit 3 of 10 questions" in format_result(result)
    with pytest.raises(InputError, match="--limit is 0"):
        score(files, limit=0)


def test_missing_answers_are_refused_or_partial(files: Path) -> None:
    lines = (files / "answers.jsonl").read_text().splitlines(keepends=True)
    (files / "answers.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(InputError, match=r"1 of 10 questions has no answer \(first: 0\)"):
        score(files)
    result = score(files, allow_missing=True)
    assert result["headline"]["value"] == pytest.approx(500 / 9)
    assert result["why_partial"] == "1 of 10 questions unanswered"
    (files / "answers.jsonl").write_text('{"id": 77, "answer": "x"}\n')
    with pytest.raises(InputError, match="answers none of 10 questions"):
        score(files, allow_missing=True)


def test_questions_that_came_before(files: Path) -> None:
    with (files / "questions.jsonl").open("a") as file:
        file.write('{"id": 3, "question": "Q?", "answers": "yes"}\n')
    with pytest.raises(InputError, match="1 question of own had an id that came before, the first is '3'"):
        read_questions(get_task("own"), files)


def test_fields_that_differ_from_the_official_ones(tmp_path: Path) -> None:
    (tmp_path / "CLEVR_val_questions.json").write_text(
        json.dumps({"questions": [{"question": "?", "image_filename": "a", "program": 7}]})
    )
    with pytest.raises(InputError, match=r"clevr in .*, version 1.0, question 1: its fields .*TypeError"):
        read_questions(get_task("clevr"), tmp_path)
    (tmp_path / "val.json").write_text(
        json.dumps([{"image": "a", "question": "?", "answers": [{"answer": None}]}])
    )
    with pytest.raises(InputError, match="None stands where a text should"):
        read_questions(get_task("vizwiz"), tmp_path)


def test_drift_is_flagged_beyond_what_retraining_makes() -> None:
    mme, pope, vqav2, clevr = (releases()[name] for name in ("mme", "pope", "vqav2", "clevr"))
    assert mme.published == {"LLaVA-1.5-7B": 1510.7, "LLaVA-1.5-13B": 1531.3}
    assert not drift(mme, 1495.0, "LLaVA-1.5-7B", comparable=True)["drifted"]
    assert drift(mme, 1480.0, "LLaVA-1.5-7B", comparable=True)["drifted"]
    assert drift(pope, 84.0, "LLaVA-1.5-7B", comparable=True)["drifted"]
    assert not drift(pope, 84.0, "LLaVA-1.5-7B", comparable=False)["drifted"]
    assert not drift(vqav2, 70.0, "LLaVA-1.5-7B", comparable=True)["drifted"]  # val here, test-dev there
    assert drift(clevr, 70.0, "LLaVA-1.5-7B", comparable=True) == {}


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="not a result of pumice eval"):
        read_result(tmp_path / "x.json")
    # Editors on Windows write a byte order mark.
    (tmp_path / "x.json").write_text('{"format": 1, "headline": {}}', encoding="utf-8-sig")
    assert read_result(tmp_path / "x.json")["format"] == 1
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"x\.json' cannot be read \(.*write it with --json"):
        read_result(tmp_path / "x.json")


def test_one_of_a_thing_is_counted_as_one() -> None:
    """Noun and verb agree with the number, and 0 is plural."""
    nouns = [("row", ""), ("process", "wait"), ("reply", "do"), ("picture", "are"), ("box", "have")]
    nouns += [("entry", ""), ("key", ""), ("batch", "")]
    one = ["1 row", "1 process waits", "1 reply does", "1 picture is", "1 box has"]
    one += ["1 entry", "1 key", "1 batch"]
    two = ["2 rows", "2 processes wait", "2 replies do", "2 pictures are", "2 boxes have"]
    two += ["2 entries", "2 keys", "2 batches"]
    assert [counted(1, *pair) for pair in nouns] == one
    assert [counted(2, *pair) for pair in nouns] == two
    assert counted(0, "row") == "0 rows"
