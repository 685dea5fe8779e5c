"""`pumice data show` and `pumice data check`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from pumice.assistant import load
from pumice.config import IMAGE_TOKEN, ModelConfig
from pumice.conversation import from_llava
from pumice.data.check import DataReport
from pumice.data.check import check as check_rows
from pumice.data.rows import ImageFinder, Rows
from pumice.processor import Processor
from pumice.train.recipe import load_recipe
from pumice.train.shapes import processor_of

ROWS = [
    {"id": "one", "image": "gone.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
    {"id": "two", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello 漢"}]},
]  # fmt: skip


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_data_show_json(run: Any, folder: Path, tiny_folder: Path, template: str) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    arguments = ["rows.json", "--template", template, "--tokenizer", str(tiny_folder), "--json"]
    result = run("data", "show", *arguments, model=False)
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assistant = load(tiny_folder, device="cpu")
    config = dataclasses.replace(assistant.processor.config, template=template)
    processor = Processor(config, assistant.processor.tokenizer)
    for row, printed in zip(ROWS, shown, strict=True):
        turns = [(t["from"], t["value"]) for t in row["conversations"]]
        images = [row["image"]] if "image" in row else []
        sample = processor.training_sample(from_llava(row["id"], turns, images))
        # the command prints one placeholder per picture, a sample has one per image token
        ids = [
            n for i, n in enumerate(sample.input_ids.tolist()) if n != -200 or sample.input_ids[i - 1] != -200
        ]
        assert printed["id"] == row["id"]
        assert printed["input_ids"] == ids
        supervised = [n for n in printed["labels"] if n != -100]
        assert supervised == [n for n in sample.labels.tolist() if n != -100]
        assert len(printed["labels"]) == len(ids)


def test_data_show_in_words(run: Any, folder: Path, tiny_folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    arguments = ["rows.json", "--template", "chatml", "--tokenizer", str(tiny_folder / "tokenizer.json")]
    result = run("data", "show", *arguments, "--rows", "1", model=False)
    assert result.exit_code == 0, result.output
    title, tokens = result.stdout.split("\n", 1)
    assert title.startswith("one: ") and title.endswith(" supervised")
    assert tokens.strip() == (
        "<|im_start|>user\n[image]\nWhat?<|im_end|>\n<|im_start|>assistant\n[+A dog.<|im_end|>+]\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[+Yes.<|im_end|>+]"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.json", "--template", "chat-ml", "--tokenizer", "TOKENIZER"], "did you mean 'chatml'"),
        (["rows.json", "--template", "plain", "--tokenizer", "no.json"], "there is no tokenizer at no.json"),
        (["rows.json", "--template", "plain", "--tokenizer", "."], "there is no tokenizer at"),
        (["rows.json", "--template", "plain", "--tokenizer", "rows.json"], "is not a tokenizer.json"),
        (["no.json", "--template", "plain", "--tokenizer", "TOKENIZER"], "'no.json' cannot be read"),
        (["rows.json", "--template", "plain", "--tokenizer", "TOKENIZER", "--images", "."], "'gone.jpg'"),
    ],
)
def test_data_show_wrong_input(
    run: Any, refused: Any, folder: Path, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    named = [str(tiny_folder) if a == "TOKENIZER" else a for a in arguments]
    refused(run("data", "show", *named, "--json", model=False), message)


def test_the_two_counts_of_a_row_are_told_apart(run: Any, folder: Path, tiny_folder: Path) -> None:
    """`data show` counts a picture as one token, `data check` its image tokens; each says which."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    (folder / "rows.json").write_text(json.dumps([{"id": "r1", "image": "cat.png", "conversations": turns}]))
    recipe = {
        "name": "n", "output": "o", "model": str(tiny_folder), "stage": {"learn": {"connector": 1e-3}},
        "data": [{"rows": "rows.json"}], "pictures": ["."], "precision": "fp32",
    }  # fmt: skip
    (folder / "r.yaml").write_text(json.dumps(recipe))  # which is YAML, too
    shown = run("data", "show", "rows.json", "--model", str(tiny_folder), model=False).stdout
    counts = re.search(r"(\d+) tokens \(a picture counts as one; (\d+) with its image tokens, as", shown)
    checked = run("data", "check", "--recipe", "r.yaml", "--no-sample", model=False).stdout
    longest = re.search(r"^tokens of a row, with its pictures' image tokens: .*, longest (\d+);", checked)
    assert counts is not None and longest is not None
    image_tokens = ModelConfig.from_dict(json.loads((tiny_folder / "config.json").read_text())).image_tokens
    assert int(counts[2]) == int(longest[1]) == int(counts[1]) + image_tokens - 1


def test_data_show_shows_a_recipe_as_it_is_learned(
    run: Any, refused: Any, folder: Path, tiny_folder: Path
) -> None:
    """The same ids as in training: image tokens, the stage's template, and rows that are too long refused."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    long = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog. " * 99}]
    rows = [{"id": "r1", "image": "cat.png", "conversations": turns}, {"id": "r2", "conversations": long}]
    (folder / "rows.json").write_text(json.dumps(rows))
    values: dict[str, Any] = {
        "name": "n", "output": "o", "model": str(tiny_folder),
        "stage": {"learn": {"connector": 1e-3}, "template": "plain"},
        "data": [{"rows": "rows.json"}], "pictures": ["."], "precision": "fp32", "context": 100,
    }  # fmt: skip
    (folder / "r.yaml").write_text(json.dumps(values))
    result = run("data", "show", "--recipe", "r.yaml", "--rows", "1", "--json", model=False)
    [shown] = json.loads(result.stdout)
    recipe = load_recipe(folder / "r.yaml")
    sample = processor_of(recipe).training_sample(Rows("rows.json")[0].conversation(ImageFinder(".")))
    image_tokens = ModelConfig.from_dict(json.loads((tiny_folder / "config.json").read_text())).image_tokens
    assert shown["input_ids"] == sample.input_ids.tolist() and shown["labels"] == sample.labels.tolist()
    assert shown["input_ids"].count(IMAGE_TOKEN) == image_tokens > 1
    words = run("data", "show", "--recipe", "r.yaml", model=False).stdout
    assert f"r1: {len(sample.input_ids)} tokens, " in words and f"[image x {image_tokens}]" in words
    assert re.search(r"^r2: not learned: .* takes \d+ tokens, the model's context is 100", words, re.M), words
    refused(run("data", "show", model=False), "there is nothing to show: give a file of rows, or --recipe")
    both = ["--recipe", "r.yaml", "--template", "v1"]
    refused(run("data", "show", *both, model=False), "--recipe names the model and the template; leave")


def test_errors_of_many_rows_are_folded(run: Any, folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    rows: list[dict[str, Any]] = [
        {"id": f"r{n}", "image": f"no{n}.jpg", "conversations": turns} for n in range(40)
    ]
    rows += [{"id": f"q{n}", "pics": ["cat.png"], "conversations": turns} for n in range(20)]
    rows += [{"id": "last"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    result = run("data", "check", "rows.json", model=False)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "40 rows (1, 2, 3, 4, 5, ...): picture missing, the first: picture 'no0.jpg' is"
    )
    assert lines[1].startswith(
        "20 rows (41, 42, 43, 44, 45, ...): malformed row, the first: 'rows.json', row 41"
    )
    assert "'conversations' is missing" in lines[2]  # another reason is not folded with them
    assert lines[3:] == ["     40 x picture missing", "     21 x malformed row", "0 of 61 rows can be used"]
    report = json.loads(run("data", "check", "rows.json", "--json", model=False).stdout)
    assert len(report["problems"]) == 61


def test_data_check(run: Any, refused: Any, folder: Path) -> None:
    rows = [dict(ROWS[0], image="cat.png"), ROWS[1]]
    (folder / "rows.json").write_text(json.dumps(rows))
    result = run("data", "check", "rows.json", "--images", ".", model=False)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "2 of 2 rows can be used\n", "")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    result = run("data", "check", "rows.json", "--images", ".", model=False)
    assert result.exit_code == 1
    assert result.stdout.startswith("row 1 (one): picture missing: ")
    assert result.stdout.endswith("1 of 2 rows can be used\n")
    result = run("data", "check", "rows.json", "--images", ".", "--json", "--budget", "0.5", model=False)
    assert (result.exit_code, json.loads(result.stdout)["usable"]) == (0, 1)
    refused(run("data", "check", "rows.json", "--images", "no", model=False), "'no' does not exist")


def test_data_show_draws_pictures_and_writes_a_page(run: Any, folder: Path, tiny_folder: Path) -> None:
    rows = [dict(ROWS[0], image="cat.png"), ROWS[0], {"id": "<b>"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    arguments = ["rows.json", "--template", "chatml", "--tokenizer", str(tiny_folder), "--images", "."]
    result = run("data", "show", *arguments, "--pictures", "--rows", "1", model=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("▀" * 40) > 5 and "[+A dog." in result.stdout
    result = run("data", "show", "rows.json", "--html", "page.html", model=False)
    assert (result.exit_code, result.stdout) == (0, "page.html: 3 of 3 rows (JSON)\n")
    page = (folder / "page.html").read_text("utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') == 1 and page.count("A dog.") == 2
    assert "gone.jpg" in page and "&lt;b&gt;" in page and "<b>'" not in page


def test_data_convert(run: Any, refused: Any, folder: Path) -> None:
    (folder / "table.csv").write_text("photo,ask,reply\ncat.png,What?,A dog.\n")
    columns = ["--columns", "image=photo", "--columns", "question=ask", "--columns", "answer=reply"]
    result = run("data", "convert", "table.csv", "out", *columns, model=False)
    assert (result.exit_code, result.stdout) == (0, "out (rows written: 1, rows left out: 0)\n")
    written = json.loads((folder / "out" / "rows.jsonl").read_text())
    assert written["image"] == "images/cat.png" and (folder / "out" / "images" / "cat.png").is_file()
    result = run("data", "check", "out/rows.jsonl", "--images", "out", model=False)
    assert (result.exit_code, result.stdout) == (0, "1 of 1 row can be used\n")
    refused(run("data", "convert", "table.csv", "new", model=False), "columns: {image: photo, question: ask")
    refused(
        run("data", "convert", "table.csv", "new", "--columns", "image", model=False), "write ROLE=COLUMN"
    )


def test_a_fixed_copy_of_another_form_is_llavas(run: Any, folder: Path) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    (folder / "rows.jsonl").write_text(
        json.dumps({"id": "a", "images": ["cat.png"], "messages": turns}) + "\n"
    )
    result = run("data", "check", "rows.jsonl", "--fix", "fixed.json", model=False)
    assert result.exit_code == 0 and "<image> added: 1 picture without <image>" in result.stdout
    assert "rows given <image>: 1" in result.stdout
    [row] = json.loads((folder / "fixed.json").read_text())
    assert row == {
        "id": "a", "image": "cat.png",
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}],
    }  # fmt: skip
    assert "<image> added" not in run("data", "check", "fixed.json", model=False).stdout


def test_pictures_are_opened_by_one_process_per_usable_core(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of 64 cores, of which this process may use one."""
    (folder / "rows.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    workers: list[int] = []

    def check(*rows: Any, **settings: Any) -> DataReport:
        workers.append(settings["workers"])
        return check_rows(*rows, **settings | {"workers": 0})

    monkeypatch.setattr("pumice.data.check.check", check)
    assert run("data", "check", "rows.json", model=False).exit_code == 1
    assert workers == [1]
