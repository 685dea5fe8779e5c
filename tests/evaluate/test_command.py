"""`pumice eval`: what it prints and writes, its exit statuses, the pages."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pumice.cli import app
from pumice.evaluate.compare import format_points, verdict


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six questions about three pictures; model "one" is right on four, "two" on five."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for n in range(6):
        image = f"{n // 2}.png"
        Image.new("RGB", (600, 300), (40 * n, 80, 90)).save(tmp_path / image)
        rows.append(
            {"id": n, "image": image, "question": f"Is it <b>{n}</b>?", "answers": "yes", "category": "odd"}
        )
    write(tmp_path / "questions.jsonl", rows)
    for name, wrong in (("one", (0, 3)), ("two", (3,))):
        answers = [{"id": n, "answer": "no" if n in wrong else "Yes.", "model": name} for n in range(6)]
        write(tmp_path / f"{name}.jsonl", answers)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


class Tags(HTMLParser):
    """Raises where a tag is closed that is not the last one open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def refused(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


OWN = ("own", "--data", ".", "--predictions")


def test_scores_a_file(folder: Path) -> None:
    result = run(*OWN, "one.jsonl", "--json", "out.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Your own file (all), one: score 66.67%  [")
    assert json.loads((folder / "out.json").read_text())["headline"]["value"] == pytest.approx(200 / 3)
    printed = run(*OWN, "one.jsonl", "--json", "-")
    assert json.loads(printed.stdout) == json.loads((folder / "out.json").read_text())


def test_wrong_input(folder: Path) -> None:
    refused(run(), "there is no task")
    refused(run("popes", "--data", "."), "there is no task 'popes'")
    refused(
        run("pope", "--data", ".", "--predictions", "one.jsonl"), "'coco_pope_adversarial.json' is not in '.'"
    )
    refused(run("own", "--predictions", "one.jsonl"), "--data is missing")
    for output in ("--json", "--report", "--submission"):
        refused(run(*OWN, "one.jsonl", output, "one.jsonl"), "'one.jsonl' is named twice")
    refused(run("own", "--data", "."), "--predictions is missing")
    refused(run(*OWN, "no.jsonl"), "'no.jsonl' cannot be read")
    refused(run(*OWN, "one.jsonl", "--json", "no/x.json"), "the folder 'no'")
    refused(run(*OWN, "one.jsonl", "--report", "."), "'.' is a folder")
    refused(run(*OWN, "one.jsonl", "--judge-url", "http://x", "--judge-model", "m"), "own needs no judge")
    refused(
        run(*OWN, "one.jsonl", "--reference", "LLaVA-1.5-7B"), "no numbers of own are published; leave out"
    )
    pope = ["pope", "--data", ".", "--predictions", "one.jsonl"]
    refused(run(*pope, "--reference", "GPT"), "no number of 'GPT' is known for pope; use one of LLaVA-1.5-7B")
    refused(run(*pope, "--boxes", "qwen"), "pope has no boxes; leave out --boxes")
    refused(run(*OWN, "one.jsonl", "--with", "other.json"), "--with adds results to a page; add --report")
    compared = ["--compare", "two.jsonl", "--with", "other.json"]
    refused(run(*OWN, "one.jsonl", *compared), "--with does nothing beside --compare; leave it out")
    compared = ["--compare", "two.jsonl", "--reference", "LLaVA-1.5-7B"]
    refused(run(*pope, *compared), "--reference does nothing beside --compare; leave it out")
    address = ["--model", "http://127.0.0.1:9/v1", "--model-name", "m", "--device", "cpu"]
    refused(run(*OWN, "new.jsonl", *address), "--device is for a model of this machine")
    refused(run(*OWN, "one.jsonl", "--model", "http://x/v1"), "name its model there with --model-name")
    for option in (["--model-name", "llava"], ["--slots", "2"], ["--device", "cpu"]):
        refused(run(*OWN, "one.jsonl", *option), f"{option[0]} is for a model that answers")
    (folder / "one.jsonl").write_text('{"id": 0, "answer": "yes"}\n')
    refused(run(*OWN, "one.jsonl"), "5 of 6 questions have no answer (first: 1)")
    result = run(*OWN, "one.jsonl", "--allow-missing")
    assert result.exit_code == 0
    assert "PARTIAL: 5 of 6 questions unanswered" in result.stdout


def test_names_the_benchmarks() -> None:
    result = run("--list")
    assert result.exit_code == 0
    assert "POPE: f1; splits test" in result.stdout


def test_a_page_needs_nothing_from_elsewhere(folder: Path) -> None:
    run(*OWN, "two.jsonl", "--json", "other.json")
    result = run(*OWN, "one.jsonl", "--report", "page.html", "--with", "other.json", "--limit", "5")
    assert result.exit_code == 0, result.output
    page = (folder / "page.html").read_text()
    Tags(page)
    assert not re.search(r"https?://", page)
    assert page.count("<li data-kind=") == 5
    assert page.count('data-kind="wrong"') == 2
    assert "&lt;b&gt;0&lt;/b&gt;" in page and "<b>0</b>" not in page
    assert page.count("data:image/jpeg;base64,") == 5
    assert "Partial:" in page
    assert page.count("Your own file (partial)") == 3  # the table, the heading, the answers
    assert 'lang="en"' in page and "prefers-color-scheme: dark" in page
    (folder / "0.png").unlink()
    run(*OWN, "one.jsonl", "--report", "page.html")
    assert "(the picture is missing)" in (folder / "page.html").read_text()


def test_from_three_results_on_there_is_a_radar(folder: Path) -> None:
    run(*OWN, "one.jsonl", "--json", "r.json")
    first_result = json.loads((folder / "r.json").read_text())
    for task, value in (("pope", 80.0), ("mme", 1000.0)):
        other = {**first_result, "task": task, "title": task.upper(), "published": {"LLaVA-1.5-7B": value}}
        (folder / f"{task}.json").write_text(json.dumps(other))
    run(*OWN, "one.jsonl", "--report", "page.html", "--with", "pope.json", "--with", "mme.json")
    page = (folder / "page.html").read_text()
    Tags(page)
    assert page.count("<svg ") == 1
    assert 'aria-label="Radar of the headlines. this model: Your own file 0.67, POPE 0.67, MME 0.03' in page


def test_compares_two_files(folder: Path) -> None:
    result = run(*OWN, "one.jsonl", "--compare", "two.jsonl", "--report", "both.html", "--json", "both.json")
    assert result.exit_code == 0, result.output
    comparison = json.loads((folder / "both.json").read_text())
    assert comparison["models"] == ["one", "two"]
    assert comparison["difference"] == pytest.approx(-100 / 6)  # --predictions minus --compare
    assert (comparison["better"], comparison["worse"], comparison["mcnemar"]) == (0, 1, 1.0)
    assert comparison["interval"][0] <= comparison["interval"][1] <= 0
    sentence = "two.jsonl is 16.67 points better than one.jsonl (1 answer better, 0 worse)"
    assert result.stdout.startswith(f"Your own file: {sentence}\n")
    page = (folder / "both.html").read_text()
    Tags(page)
    assert page.count("<li data-kind=") == 1
    assert 'data-kind="one worse"' in page
    assert f"<p>{sentence}.</p>" in page
    assert "one minus two" in page and "-16.67" in page
    turned = run(*OWN, "two.jsonl", "--compare", "one.jsonl")
    assert turned.stdout.startswith(f"Your own file: {sentence}\n")
    shutil.copy("two.jsonl", "copy.jsonl")
    equal = run(*OWN, "two.jsonl", "--compare", "copy.jsonl")
    refused(run(*OWN, "one.jsonl", "--compare", "two.jsonl", "--model", "x"), "--compare is for two files")
    assert "two.jsonl is as good as copy.jsonl (0 answers better, 0 worse)" in equal.stdout
    assert "two in two.jsonl minus two in copy.jsonl: +0.00" in equal.stdout  # answers of one model


def test_answers_that_cannot_be_compared(folder: Path) -> None:
    lines = (folder / "two.jsonl").read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(lines[:4]))
    (folder / "first.jsonl").write_text(lines[0])
    (folder / "last.jsonl").write_text(lines[5])
    write(folder / "others.jsonl", [{"id": n + 10, "answer": "Yes."} for n in range(6)])
    refused(run(*OWN, "two.jsonl", "--compare", "./two.jsonl"), "are one file, 'two.jsonl'; name two files")
    refused(run(*OWN, "two.jsonl", "--compare", "fewer.jsonl"), "2 of 6 questions have no answer")
    refused(run(*OWN, "two.jsonl", "--compare", "others.jsonl"), "6 answers are to unknown questions")
    part = ("--allow-missing",)
    refused(run(*OWN, "two.jsonl", "--compare", "others.jsonl", *part), "answers none of 6 questions")
    refused(run(*OWN, "first.jsonl", "--compare", "last.jsonl", *part), "answer no question in common")
    fewer = run(*OWN, "two.jsonl", "--compare", "fewer.jsonl", *part)
    assert "PARTIAL: 4 of 6 questions" in fewer.stdout


@pytest.fixture
def captions(folder: Path) -> tuple[str, ...]:
    """CHAIR's files for two pictures of a dog. The arguments that score captions of them."""
    files = {
        "instances": {
            "images": [{"id": n, "file_name": f"{n}.png"} for n in (1, 2)],
            "categories": [{"id": 18, "name": "dog"}],
            "annotations": [{"image_id": n, "category_id": 18} for n in (1, 2)],
        },
        "captions": {"annotations": []},
    }
    for name, values in files.items():
        (folder / f"{name}_val2014.json").write_text(json.dumps(values))
    (folder / "synonyms.txt").write_text("dog\ncat\n")
    answers = {"true": "A dog.", "wrong": "A dog and a cat.", "mute": "Nothing."}
    for name, caption in answers.items():
        rows = [{"question_id": "1", "text": "A dog."}, {"question_id": "2", "text": caption}]
        write(folder / f"{name}.jsonl", rows if name != "mute" else [row | {"text": caption} for row in rows])
    return "chair", "--data", ".", "--predictions"


@pytest.mark.parametrize("names", [("true", "wrong"), ("wrong", "true")])
def test_where_lower_is_better_the_file_with_fewer_wrong_objects_wins(
    captions: tuple[str, ...], names: tuple[str, str]
) -> None:
    first, second = (f"{name}.jsonl" for name in names)
    result = run(*captions, first, "--compare", second, "--json", "both.json")
    assert result.exit_code == 0, result.output
    sentence = "true.jsonl is 33.33 points better than wrong.jsonl (1 answer better, 0 worse)"
    assert result.stdout.startswith(f"CHAIR: {sentence}\n")
    sign = -1 if names[0] == "true" else 1
    assert f"{names[0]} minus {names[1]}: {sign * 33.33:+.2f}, 95%" in result.stdout
    assert json.loads(Path("both.json").read_text())["difference"] == pytest.approx(sign * 100 / 3)


def test_captions_that_name_no_object_cannot_be_compared(captions: tuple[str, ...]) -> None:
    for names in (("true.jsonl", "mute.jsonl"), ("mute.jsonl", "true.jsonl")):
        message = "the answers in mute.jsonl give no CHAIRi; compare others"
        refused(run(*captions, names[0], "--compare", names[1]), message)


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.50"), (0.0, "0.00"), (0.0042, "0.0042"), (0.000001, "0.000001")]
)
def test_a_small_gain_is_not_printed_as_0(value: float, text: str) -> None:
    comparison = {"files": ["a", "b"], "difference": -value, "better": 1, "worse": 0}
    sentence = verdict(comparison | {"lower_is_better": True})
    relation = f"{text} points better than" if value else "as good as"
    assert sentence == f"a is {relation} b (1 answer better, 0 worse)"
    assert format_points(value, "+") == f"+{text}"


def test_a_server_that_scores(folder: Path) -> None:
    rows = [{"image_id": 1, "question": "What?", "question_id": 5}]
    (folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps({"questions": rows}))
    write(folder / "a.jsonl", [{"question_id": 5, "text": "The dog."}])
    arguments = ("vqav2", "--split", "test-dev", "--data", ".", "--predictions", "a.jsonl")
    refused(run(*arguments), "not public")
    result = run(*arguments, "--submission", "up.json")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "up.json").read_text()) == [{"question_id": 5, "answer": "dog"}]
    refused(run(*OWN, "one.jsonl", "--submission", "up.json"), "own has no server")


def test_boxes_are_read_as_the_model_or_the_option_says(folder: Path, tiny_folder: Path) -> None:
    Image.new("RGB", (200, 100)).save(folder / "wide.png")
    row = {"id": "1", "image": "wide.png", "question": "?", "answers": [[0, 0, 100, 100]], "metric": "box"}
    write(folder / "questions.jsonl", [row])
    write(folder / "b.jsonl", [{"id": "1", "answer": "(0,0),(500,1000)"}])
    refused(
        run(*OWN, "b.jsonl", "--boxes", "yolo"), "boxes: there is no form 'yolo'; use one of padded, picture"
    )
    for form, score in (("qwen", 100), ("padded", 0)):
        values = json.loads(run(*OWN, "b.jsonl", "--json", "-", "--boxes", form).stdout)
        assert values["metrics"]["score"] == score
    assert values["metrics"] == json.loads(run(*OWN, "b.jsonl", "--json", "-").stdout)["metrics"]
    shutil.copytree(tiny_folder, folder / "boxes")
    config = json.loads((folder / "boxes" / "config.json").read_text())
    (folder / "boxes" / "config.json").write_text(json.dumps({**config, "boxes": "pixels"}))
    arguments = (
        *OWN,
        "made.jsonl",
        "--model",
        "boxes",
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        "--json",
        "-",
    )
    notes = json.loads(run(*arguments).stdout)["notes"]
    assert "boxes are read in the form 'pixels'; --boxes names another" in notes


def test_a_model_answers_and_is_scored(folder: Path, tiny_folder: Path) -> None:
    """The one test here that needs torch: a whole run on a real small model, and again from its file."""
    arguments = (*OWN, "made.jsonl", "--model", str(tiny_folder), "--device", "cpu")
    result = run(*arguments, "--limit", "3")
    assert result.exit_code == 0, result.output
    answers = (folder / "made.jsonl").read_text()
    assert len(answers.splitlines()) == 3
    assert run(*arguments).exit_code == 0
    assert (folder / "made.jsonl").read_text().startswith(answers)
    assert len((folder / "made.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("q.json", b'[{"id": 1, "question": "a", "answers": "b"}, {"id', "line 1, column 47: a text has no"),
        ("q.jsonl", b'{"question": "a"}\n{"question" "b"}', "line 2: this is not JSON (column 13: a colon"),
        (
            "q.jsonl",
            b'{"question": %s}\n' % (b"1" * 5000),
            "line 1: this is not JSON (a number has too many digits); a right",
        ),
        ("q.jsonl", b'{"question": "caf\xe9", "answers": "b"}', "is not UTF-8 text; save it as UTF-8"),
        ("q.json", b'[{"question": "a", "answers": "b"}, 3]', "row 2"),
        ("q.json", b'["a"]', "row 1 is no object: 'a'; a right row is"),
        ("q.jsonl", b'{"answers": "b"}', "row 1: 'question' is missing; a right row is"),
        (
            "q.jsonl",
            b'{"question": 5, "answers": "b"}',
            "row 1: 'question' must be a text, found 5",
        ),
        (
            "q.jsonl",
            b'{"question": 5, "answers": "A", "choices": ["b"]}',
            "row 1: 'question' must be a text, found 5",
        ),
        (
            "q.jsonl",
            b'{"question": "a", "answers": "b", "prompt": 5}',
            "row 1: 5 stands where a text should; a right row is",
        ),
        ("q.jsonl", b'{"question": "a"}', "row 1: 'answers' is missing; write a text or a list of texts"),
        (
            "q.jsonl",
            b'{"question": "a", "answers": [null]}',
            "must be a text or a list of texts, found [None]",
        ),
        ("q.csv", b"ask me,then\na,b\n", "columns: {question: ask me, answer: then}, or rename them"),
        ("q.tsv", b"", "q.tsv' is empty; write a table of questions, or one row per line such as {"),
        ("q.csv", b"", "q.csv' is empty; write a table of questions, or one row per line such as {"),
        ("q.tsv", b"question\tanswer\n", "q.tsv' holds no rows; add some below its header"),
        ("q.jsonl", b"\n", "q.jsonl' is empty; write a table of questions, or one row per line such as {"),
        ("q.json", b"[]", "q.json' holds no questions; write one row per line, such as {"),
        (
            "q.jsonl",
            b'{"id": 1, "question": "a", "answers": "b"}\n' * 2,
            "1 question of own had an id that came before, the first is '1'; give each row another id",
        ),
    ],
)
def test_what_is_wrong_with_a_file_of_ones_own(folder: Path, name: str, data: bytes, message: str) -> None:
    """Nobody can fetch it again, and there is no official one."""
    (folder / name).write_bytes(data)
    result = run("own", "--data", name, "--predictions", "one.jsonl")
    refused(result, message)
    text = " ".join(result.stderr.split())
    assert "fetch" not in text and "official" not in text and "set_int_max" not in text
