"""Other ways to write the rows of a format give the same rows."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import Examples, asked_about, dialogue, jsonl, pack, turns

from pumice.data.rows import ImageFinder, Rows
from pumice.images import open_image


def as_base64(e: Examples, kind: str) -> list[dict[str, Any]]:
    values = asked_about(e)
    for value in values:
        buffer = io.BytesIO()
        Image.open(e.folder / value["image"]).save(buffer, kind, lossless=True)
        # Python's own `encodebytes` breaks lines.
        value["image"] = base64.encodebytes(buffer.getvalue()).decode()
    return values


def table(e: Examples, delimiter: str, first: str = "id", lead: str = "") -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow([first, "image", "question", "answer"])
    writer.writerows([value.values() for value in asked_about(e)])
    return lead + buffer.getvalue()


# Other ways in which people write the same rows: the text of a file, and whether it has ids.
VARIANTS: dict[str, tuple[Callable[[Examples], str], bool]] = {
    "a list in an object": (lambda e: json.dumps({"name": "x", "data": asked_about(e)}), True),
    "a list in an object, indented": (lambda e: json.dumps({"rows": asked_about(e)}, indent=2), True),
    "objects over several lines": (
        lambda e: "\n".join(json.dumps(v, indent=1) for v in asked_about(e)),
        True,
    ),
    "paths of Windows": (
        lambda e: "\n".join(json.dumps(v | {"image": ".\\" + v["image"]}) for v in asked_about(e)),
        True,
    ),
    "a table with an index of pandas": (lambda e: table(e, ",", ""), False),
    "a table of Excel": (lambda e: table(e, ";", lead="\ufeff"), True),
    "a picture as base64, PNG": (lambda e: "\n".join(map(json.dumps, as_base64(e, "PNG"))), True),
    "a picture as base64, WebP": (lambda e: "\n".join(map(json.dumps, as_base64(e, "WEBP"))), True),
    "a picture as base64, BMP": (lambda e: "\n".join(map(json.dumps, as_base64(e, "BMP"))), True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_to_write_the_same_rows(name: str, examples: Examples, tmp_path: Path) -> None:
    write, has_ids = VARIANTS[name]
    # Pictures are found beside the rows.
    path = examples.folder / "rows"
    path.write_text(write(examples), "utf-8", newline="")
    rows, finder = Rows(path), ImageFinder(tmp_path)
    assert [row.turns for row in rows] == [
        (("human", f"<image>\n{r.question}"), ("gpt", r.answer)) for r in examples.rows
    ]
    assert not has_ids or [row.id for row in rows] == [r.id for r in examples.rows]
    for row, example in zip(rows, examples.rows, strict=True):
        image = open_image(row.find(row.image[0], finder))
        assert image.tobytes() == open_image(examples.folder / example.image).tobytes()


@pytest.mark.parametrize("form", ["conversations", "texts", "messages"])
def test_a_list_as_the_json_of_a_tar(form: str, examples: Examples, tmp_path: Path) -> None:
    row = examples.rows[0]
    values: dict[str, list[dict[str, str]]] = {
        "conversations": turns(row, ("human", "gpt"), ""),
        "texts": [{"user": row.question, "assistant": row.answer}],
        "messages": dialogue(row.question, row.answer),
    }
    files = {"a.png": examples.bytes_of(row), "a.json": json.dumps(values[form]).encode()}
    [read] = Rows(pack(tmp_path / "r.tar", files))
    assert [text.removeprefix("<image>").strip() for _, text in read.turns] == [row.question, row.answer]
    assert len(read.image) == 1


def test_a_table_that_belongs_to_a_sample(examples: Examples, tmp_path: Path) -> None:
    row = examples.rows[0]
    values = json.dumps({"question": row.question, "answer": row.answer}).encode()
    files = {"chart.png": examples.bytes_of(row), "chart.json": values, "chart.csv": b"a,b\n1,2\n"}
    assert [read.turns[1] for read in Rows(pack(tmp_path / "r.tar", files))] == [("gpt", row.answer)]


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        # MathVista's choices may be numbers, MMMU's and MathVision's open questions have no choices.
        ({"image": "a.png", "question": "How many?", "choices": ["2", "3", "4"], "answer": "3"}, "3"),
        ({"image": "a.png", "question": "How many?", "choices": ["135", "145"], "answer": "145"}, "145"),
        ({"image": "a.png", "question": "How many?", "options": "[]", "answer": "8"}, "8"),
        ({"image": "a.png", "question": "How many?", "options": [], "answer": "0"}, "0"),
        # Names of files that are a part of the text.
        ({"instruction": "What is it?", "input": "https://x.org/a.jpg", "output": "A jpg."}, "A jpg."),
        ({"query": "And this?", "response": "Another.", "history": [["a.jpg", "b.png"]]}, "Another."),
    ],
)  # fmt: skip
def test_rows_that_only_look_wrong(values: dict[str, Any], answer: str, tmp_path: Path) -> None:
    assert Rows(jsonl(tmp_path / "r", [values]))[0].turns[-1] == ("gpt", answer)
