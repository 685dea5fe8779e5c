"""ScienceQA, MMBench, SEED-Bench, MMStar and MMMU: official layouts made small, scores by hand."""

from __future__ import annotations

import base64
import re
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.evaluate.files import options
from pumice.evaluate.result import read_questions
from pumice.evaluate.task import Answered
from pumice.evaluate.tasks import get_task

LETTER = "Answer with the option's letter from the given choices directly."
PICTURE = base64.b64encode(
    b"\xff\xd8 not really a picture, but long enough to be no reference at all"
).decode()


@pytest.fixture
def scienceqa(data: Any) -> Any:
    problems = {
        "7": {"question": "Which one?", "choices": ["x", "y"], "answer": 1, "hint": "Look.",
              "image": "image.png", "subject": "natural science", "grade": "grade2"},
        "8": {"question": "And now?", "choices": ["x", "y", "z"], "answer": 0, "hint": "", "image": None,
              "subject": "social science", "grade": "grade3"},
        "9": {"question": "Train?", "choices": ["x"], "answer": 0, "hint": "", "image": None},
    }  # fmt: skip
    data.json("problems.json", problems)
    data.json("pid_splits.json", {"test": ["7", "8"], "train": ["9"]})
    return data


def test_scienceqa(scienceqa: Any, scored: Any, asked: Any) -> None:
    result = scored("scienceqa", {"7": "B. y", "8": "The answer is C."})
    assert result["headline"]["name"] == "image_accuracy"
    assert result["headline"]["value"] == 100
    assert result["metrics"]["accuracy"] == 50
    assert result["categories"]["modality"]["neither"]["value"] == 0
    questions = asked("scienceqa")
    assert questions["7"].prompt == f"Context: Look.\nQuestion: Which one?\nOptions: (A) x (B) y\n{LETTER}"
    assert questions["8"].prompt.startswith("Context: N/A\n")
    assert questions["7"].images[0].name == "7/image.png"
    assert questions["8"].images == ()


def test_scienceqa_with_a_problem_missing(scienceqa: Any, scored: Any) -> None:
    scienceqa.json("pid_splits.json", {"test": ["7", "70"]})
    with pytest.raises(InputError, match=r"1 of 2 problems .* the first is 70"):
        scored("scienceqa", {"7": "B"})


def table(rows: list[list[str]]) -> str:
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
              "l2-category", "comment", "split"]  # fmt: skip
    return "\n".join("\t".join(row) for row in [header, *rows]) + "\n"


@pytest.fixture
def mmbench(data: Any) -> Any:
    end = ["image_scene", PICTURE, "web", "coarse_perception", "", "dev"]
    rows = [
        ["1", "What?", "", "cat", "dog", "", "", "A", *end],
        ["1000001", "What?", "nan", "dog", "cat", "", "", "B", "image_scene", "1", *end[2:]],
        [
            "2",
            '"Which, ""this""?"',
            "See.",
            "red",
            "blue",
            "None",
            "x",
            "B",
            "ocr",
            PICTURE,
            "web",
            "logic",
            "",
            "dev",
        ],
    ]
    data.text("mmbench_dev_20230712.tsv", table(rows))
    return data


def test_mmbench_is_circular(mmbench: Any, scored: Any, asked: Any) -> None:
    result = scored("mmbench", {1: "A", 1000001: "A", 2: "(B) blue"})
    # Question 1 is right in one order and wrong in the other: wrong. Question 2: right.
    assert result["headline"]["value"] == 50
    assert result["metrics"]["accuracy_every_rotation"] == pytest.approx(200 / 3)
    assert result["metrics"]["accuracy_first_order"] == 100
    assert result["categories"]["ability (l2)"] == {
        "coarse_perception": {"value": 0, "questions": 1},
        "logic": {"value": 100, "questions": 1},
    }
    questions = asked("mmbench")
    options = "A. red\nB. blue\nC. None\nD. x"  # the official script would stop before "None"
    assert questions["2"].prompt == f'See.\nWhich, "this"?\n{options}\n{LETTER}'
    assert questions["1000001"].images[0].source() == base64.b64decode(PICTURE)
    assert questions["1000001"].group == "1"


def test_mmbench_answers_that_no_rule_reads(mmbench: Any, scored: Any) -> None:
    result = scored("mmbench", {1: "A cat", 1000001: "the cat", 2: ""})
    assert result["headline"]["value"] == 50
    assert result["metrics"]["unread"] == 1


def test_mmbench_for_the_server(mmbench: Any, tmp_path: Path) -> None:
    task = get_task("mmbench")
    answered = [Answered(q, "A & <b>") for q in read_questions(task, mmbench.path).questions]
    task.submission(answered, tmp_path / "up.xlsx", mmbench.path)
    with zipfile.ZipFile(tmp_path / "up.xlsx") as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
        texts = re.findall(r"<t[^>]*>(.*?)</t>", archive.read("xl/sharedStrings.xml").decode())
    assert sheet.count("<row ") == 4
    assert re.search(r'<c r="A4"><v>2</v></c>', sheet)
    assert texts[:8] == ["index", "question", "A", "B", "C", "D", "prediction", "answer"]
    assert "A &amp; &lt;b&gt;" in texts and "image" not in texts
    openpyxl: Any = pytest.importorskip("openpyxl")
    cells = list(openpyxl.load_workbook(tmp_path / "up.xlsx").active.values)
    assert cells[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer")
    assert cells[3][:4] == (2, 'Which, "this"?', "red", "blue")


def test_mmbench_without_the_library_of_workbooks(
    mmbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    answered = [Answered(q, "A") for q in read_questions(get_task("mmbench"), mmbench.path).questions]
    with pytest.raises(InputError, match=r"needs XlsxWriter: pip install .*\[eval\]'"):
        get_task("mmbench").submission(answered, tmp_path / "up.xlsx", mmbench.path)
    assert not (tmp_path / "up.xlsx").exists()


def test_mmbench_cut_off(mmbench: Any, scored: Any) -> None:
    mmbench.text("mmbench_dev_20230712.tsv", table([["1", "What?", "", "cat"]]))
    with pytest.raises(InputError, match="row 2: 4 columns where the header has 14"):
        scored("mmbench", {1: "A"})


def test_mmbench_cn_asks_in_chinese(data: Any, asked: Any) -> None:
    row = ["1", "什么?", "", "猫", "狗", "", "", "A", "c", PICTURE, "w", "l", "", "dev"]
    data.text("mmbench_dev_cn_20231003.tsv", table([row]))
    assert asked("mmbench-cn")["1"].prompt == "什么?\nA. 猫\nB. 狗\n请直接回答选项字母。"


def test_seed(data: Any, scored: Any, asked: Any) -> None:
    def row(key: str, kind: str, number: int) -> dict[str, Any]:
        choices = {f"choice_{letter}": letter * 2 for letter in "abcd"}
        return {"question_id": key, "question": "What?", **choices, "answer": "B", "data_type": kind,
                "data_id": "1_2", "question_type_id": number}  # fmt: skip

    questions = [row("101", "image", 1), row("102", "image", 1), row("v3", "video", 10)]
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    data.json("SEED-Bench.json", {"questions": questions, "question_type": types})
    result = scored("seed", [{"question_id": 101, "text": "B"}, {"question_id": 102, "text": "B."},
                            {"question_id": "v3", "text": "B"}])  # fmt: skip
    # "B." is not the bare letter.
    assert result["headline"]["value"] == pytest.approx(200 / 3)
    assert result["metrics"]["accuracy_image"] == 50
    assert result["metrics"]["accuracy_video"] == 100
    assert result["metrics"]["accuracy_first_letter"] == 100
    assert result["categories"]["ability"]["Scene Understanding"]["value"] == 50
    assert asked("seed")["101"].prompt == f"What?\nA. aa\nB. bb\nC. cc\nD. dd\n{LETTER}"


def test_mmstar(data: Any, scored: Any) -> None:
    rows = [
        ["0", "Which? Options: A: x, B: y", "A", "math", "geometry", PICTURE],
        ["1", "Where? Options: A: x, B: y", "B", "math", "geometry", PICTURE],
    ]
    header = ["index", "question", "answer", "category", "l2_category", "image"]
    data.text("MMStar.tsv", "\n".join("\t".join(row) for row in [header, *rows]))
    result = scored("mmstar", {0: "(a) x", 1: "I think B"})
    assert result["headline"]["value"] == 50
    assert result["categories"]["part"]["geometry"]["questions"] == 2


@pytest.fixture
def mmmu(data: Any) -> Any:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    image = {"bytes": b"picture", "path": "1.png"}
    choice = {
        "options": "['Ann', 'Bob']",
        "image_1": image,
        "image_2": None,
        "question_type": "multiple-choice",
    }
    rows = {
        "Art": [
            {"id": "validation_Art_1", "question": "See <image 1>. Who?", "answer": "B", **choice},
            {"id": "validation_Art_2", "question": "Who now?", "answer": "A", **choice},
        ],
        "Math": [
            {"id": "validation_Math_1", "question": "<image 1> <image 2> Sum?", "options": "[]",
             "image_1": image, "image_2": image, "question_type": "open", "answer": "['1.5', '3/2']"},
        ],
    }  # fmt: skip
    for subject, subject_rows in rows.items():
        (data.path / subject).mkdir()
        parquet.write_table(
            pyarrow.Table.from_pylist(subject_rows), data.path / subject / "validation-00000-of-00001.parquet"
        )
    return data


def test_mmmu(mmmu: Any, scored: Any, asked: Any) -> None:
    answers = {
        "validation_Art_1": "(B)",
        "validation_Art_2": "no idea",
        "validation_Math_1": "The sum is 1.50",
    }
    result = scored("mmmu", answers)
    drawn = Random(42).choice(["A", "B"]) == "A"
    assert result["headline"]["value"] == pytest.approx(100 * (2 + drawn) / 3)
    assert result["metrics"]["accuracy_without_guessing"] == pytest.approx(200 / 3)
    assert result["metrics"]["unread"] == 1
    assert result["categories"]["domain"]["Science"]["value"] == 100
    questions = asked("mmmu")
    assert questions["validation_Art_1"].prompt == f"See <image>. Who?\n\n(A) Ann\n(B) Bob\n\n{LETTER}"
    assert questions["validation_Math_1"].prompt.startswith("<image> <image> Sum?")
    assert len(questions["validation_Math_1"].images) == 2


@pytest.mark.parametrize("task", ["mmbench", "mmstar"])
@pytest.mark.parametrize("word", ["None", "NA", "nan", "null"])
def test_an_option_that_looks_like_no_value_is_shown(
    data: Any, scored: Any, asked: Any, task: str, word: str
) -> None:
    options = [word, "Two", "", "Three"]
    if task == "mmbench":
        row = ["1", "How many?", "nan", *options, "A", "count", PICTURE, "s", "l2", "", "dev"]
        data.text("mmbench_dev_20230712.tsv", table([row]))
        expected = f"How many?\nA. {word}\nB. Two\nD. Three\n{LETTER}"
    else:
        header = ["index", "question", "image", "answer", "category", "l2_category", "bench", *"ABCD"]
        row = ["1", "How many?", PICTURE, "A", "c", "l2", "b", *options]
        data.text("MMStar.tsv", "\n".join("\t".join(line) for line in (header, row)) + "\n")
        expected = f"How many?\nOptions: A: {word}, B: Two, D: Three\n{LETTER}"
    assert asked(task)["1"].prompt == expected
    result = scored(task, {"1": "A"})
    assert result["metrics"]["accuracy"] == 100
    assert any('1 question has an option such as "None"' in note for note in result["notes"])


def test_every_option_that_stands_in_a_table_is_one(data: Any, scored: Any, asked: Any) -> None:
    assert options({"A": "NaN", "B": float("nan"), "C": 0, "D": None, "E": "", "F": 2.5, "G2": "?"}) == {
        "A": "NaN", "C": "0", "F": "2.5",
    }  # fmt: skip
    header = ["index", "question", "image", "answer", *"ABCDE"]
    row = ["1", "?", PICTURE, "E", "w", "x", " ", "0", "N/A"]
    text = "\n".join("\t".join(line) for line in (header, row)) + "\n"
    for task, name in (("mmstar", "MMStar.tsv"), ("mmbench", "MMBench_DEV_EN.tsv")):
        data.text(name, text)
        assert "N/A" in asked(task)["1"].prompt
        result = scored(task, {"1": "E"})
        assert (result["metrics"]["accuracy"], result["metrics"]["unread"]) == (100, 0)


def test_answers_that_no_rule_reads_are_counted(data: Any, scored: Any) -> None:
    header = ["index", "question", "image", "answer", "category", "l2_category", "bench", *"ABCD"]
    rows = [[str(n), "?", PICTURE, "A", "c", "l2", "b", "w", "x", "y", "z"] for n in (1, 2)]
    data.text("MMStar.tsv", "\n".join("\t".join(line) for line in (header, *rows)) + "\n")
    result = scored("mmstar", {"1": "A", "2": "It is w"})
    assert result["metrics"]["unread"] == 1
    assert "1 answer begins with no option's letter, which counts as wrong" in result["notes"]
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    row = {"question": "?", **choices, "answer": "A", "data_type": "image", "data_id": "p"}
    seed = [{"question_id": number, **row} for number in (1, 2)]
    data.json("SEED-Bench.json", {"questions": seed})
    result = scored("seed", {"1": "A", "2": "A."})
    assert (result["metrics"]["accuracy"], result["metrics"]["unread"]) == (50, 1)
    assert "1 answer is no letter alone, which counts as wrong, as in the original" in result["notes"]
