"""Every format of the table in docs/data.md, as the real libraries write it, gives the rows of LLaVA JSON."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import Example, Examples, dialogue, jsonl, llava, nested, turns

from pumice.data.mapping import RowMapping
from pumice.data.rows import ImageFinder, Rows

Written = Path | tuple[Path, RowMapping]
Writer = Callable[[Path, Examples], Written]
WRITERS: dict[str, Writer] = {}  # by the first column of the table
# What is asked where a format has no question, and what is answered where it has no answer of its own.
CHANGES: dict[str, Callable[[Example], Example]] = {}
WITHOUT_IDS: set[str] = set()


def writes(
    name: str, change: Callable[[Example], Example] | None = None, *, ids: bool = True
) -> Callable[[Writer], Writer]:
    def register(writer: Writer) -> Writer:
        WRITERS[name] = writer
        if change is not None:
            CHANGES[name] = change
        if not ids:
            WITHOUT_IDS.add(name)
        return writer

    return register


def asked(question: str) -> Callable[[Example], Example]:
    return lambda row: replace(row, question=question)


@writes("LLaVA JSON")
def _(out: Path, e: Examples) -> Path:
    return llava(e.rows, out / "rows.json").path


@writes("LLaVA JSONL")
def _(out: Path, e: Examples) -> Path:
    return jsonl(
        out / "r",
        [{"id": r.id, "image": r.image, "conversations": turns(r, ("human", "gpt"))} for r in e.rows],
    )


@writes("ShareGPT")
def _(out: Path, e: Examples) -> Path:
    pairs = [("user", "assistant"), ("USER", "ASSISTANT")]
    values = [
        {"id": r.id, "image": r.image, "conversations": turns(r, pairs[n % 2], "")}
        for n, r in enumerate(e.rows)
    ]
    return jsonl(out / "r.json", values)


@writes("messages, TRL")
def _(out: Path, e: Examples) -> Path:
    datasets = pytest.importorskip("datasets")
    values = [
        {
            "id": r.id,
            "images": [str(e.folder / r.image)],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": r.question}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": r.answer}]},
            ],
        }
        for r in e.rows
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "messages": [
                {"role": datasets.Value("string"), "content": [
                    {"type": datasets.Value("string"), "text": datasets.Value("string")}]}
            ],
        }
    )  # fmt: skip
    datasets.Dataset.from_list(values, features=features).to_parquet(out / "r.parquet")
    return out / "r.parquet"


@writes("messages, OpenAI", ids=False)
def _(out: Path, e: Examples) -> Path:
    values = []
    for r in e.rows:
        url = "data:image/png;base64," + base64.b64encode(e.bytes_of(r)).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": r.question}]
        values.append({"messages": dialogue(parts, r.answer)})
    return jsonl(out / "r.jsonl", values)


@writes("messages, LLaMA-Factory")
def _(out: Path, e: Examples) -> Path:
    values = [
        {"id": r.id, "messages": dialogue(f"<image>{r.question}", r.answer), "images": [r.image]}
        for r in e.rows
    ]
    (out / "r.json").write_text(json.dumps(values))
    return out / "r.json"


@writes("ms-swift")
def _(out: Path, e: Examples) -> Path:
    values = [
        {
            "id": r.id,
            "query": f"<image>{r.question}",
            "response": r.answer,
            "history": [],
            "images": [r.image],
        }
        for r in e.rows
    ]
    return jsonl(out / "r.jsonl", values)


@writes("Alpaca with images")
def _(out: Path, e: Examples) -> Path:
    values = [
        {"id": r.id, "instruction": r.question.split("\n")[0], "input": r.question.split("\n")[1],
         "output": r.answer, "images": [r.image]}
        for r in e.rows
    ]  # fmt: skip
    return jsonl(out / "r.jsonl", values)


@writes("Qwen-VL")
def _(out: Path, e: Examples) -> Path:
    values = [
        {"id": r.id, "conversations": turns(r, ("user", "assistant"), f"Picture 1: <img>{r.image}</img>\n")}
        for r in e.rows
    ]
    (out / "r.json").write_text(json.dumps(values))
    return out / "r.json"


@writes("the Cauldron", ids=False)
def _(out: Path, e: Examples) -> Path:
    datasets = pytest.importorskip("datasets")
    values = [
        {
            "images": [str(e.folder / r.image)],
            "texts": [{"user": r.question, "assistant": r.answer, "source": "x"}],
        }
        for r in e.rows
    ]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": [{k: datasets.Value("string") for k in ("user", "assistant", "source")}],
        }
    )
    datasets.Dataset.from_list(values, features=features).to_parquet(out / "r.parquet")
    return out / "r.parquet"


@writes("question and answer")
def _(out: Path, e: Examples) -> Path:
    values = [
        {"id": r.id, "image_path": r.image, "question": r.question, "answers": ["no", r.answer, r.answer]}
        for r in e.rows
    ]
    return jsonl(out / "r.jsonl", values)


@writes("image and caption", asked("Describe the picture."))
def _(out: Path, e: Examples) -> Path:
    return jsonl(
        out / "r.jsonl", [{"id": r.id, "image": r.image, "caption": [r.answer, "x"]} for r in e.rows]
    )


@writes("image and text", asked("What do you see?"))
def _(out: Path, e: Examples) -> Written:
    path = jsonl(out / "r.jsonl", [{"id": r.id, "image": r.image, "text": r.answer} for r in e.rows])
    return path, RowMapping(question="What do you see?")


@writes("VQA v2")
def _(out: Path, e: Examples) -> Path:
    questions, annotations = [], []
    for n, r in enumerate(e.rows):
        number = int(r.image[:2])
        shutil.copy(e.folder / r.image, e.folder / f"COCO_train2014_{number:012}.jpg")
        questions.append({"image_id": number, "question": r.question, "question_id": n})
        answers = [{"answer": answer, "answer_id": i} for i, answer in enumerate(("x", r.answer, r.answer))]
        annotations.append({"image_id": number, "question_id": n, "answers": answers})
    head = {"info": {"year": 2017}, "data_subtype": "train2014"}
    (out / "questions.json").write_text(json.dumps({**head, "questions": questions}))
    (out / "annotations.json").write_text(json.dumps({**head, "annotations": annotations[::-1]}))
    return out / "questions.json"


LICENSES = [{"url": "http://x.org/by/2.0/", "id": 4, "name": "Attribution License"}]  # first in COCO's files


@writes("COCO captions", asked("Describe the picture."))
def _(out: Path, e: Examples) -> Path:
    images = [{"id": n, "file_name": f"{n:02}.png", "width": 24 + n, "height": 20} for n in range(12)]
    notes = [{"id": n, "image_id": int(r.image[:2]), "caption": r.answer} for n, r in enumerate(e.rows)]
    (out / "captions.json").write_text(
        json.dumps({"info": {}, "images": images, "licenses": LICENSES, "annotations": notes})
    )
    return out / "captions.json"


OBJECTS = "List the objects in this picture, each with its box."


def boxed(row: Example) -> Example:
    wide = 24 + int(row.image[:2])
    return replace(row, question=OBJECTS, answer=f"dog [{5 / wide:.2f}, 0.25, {15 / wide:.2f}, 0.50]\ncat")


@writes("COCO instances", boxed)
def _(out: Path, e: Examples) -> Written:
    images = [{"id": n, "file_name": r.image, "width": 40, "height": 20} for n, r in enumerate(e.rows)]
    dogs = [{"id": n, "image_id": n, "category_id": 3, "bbox": [5, 5, 10, 5]} for n in range(24)]
    cats = [{"id": 99 + n, "image_id": n, "category_id": 1} for n in range(24)]
    names = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}]
    values = {"images": images, "annotations": [*dogs, *cats], "categories": names}
    values = {"info": {}, "licenses": LICENSES, **values}
    (out / "instances.json").write_text(json.dumps(values))
    return out / "instances.json", RowMapping(question=OBJECTS)


@writes("imagefolder")
def _(out: Path, e: Examples) -> Path:
    shutil.copytree(e.folder, out / "train" / "deep")
    values = [
        {"id": r.id, "file_name": f"deep/{r.image}", "question": r.question, "answer": r.answer}
        for r in e.rows
    ]
    jsonl(out / "train" / "metadata.jsonl", values)
    return out


@writes("a folder for each class", lambda r: replace(r, question="Which animal?", answer="small cat"))
def _(out: Path, e: Examples) -> Written:
    for n, r in enumerate(e.rows):
        folder = out / "small_cat" / f"{n:02}"
        folder.mkdir(parents=True)
        shutil.copy(e.folder / r.image, folder / "x.png")
    return out, RowMapping(question="Which animal?")


@writes("CSV")
def _(out: Path, e: Examples) -> Path:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame([r.__dict__ for r in e.rows])
    table.to_csv(out / "r.csv", index=False)
    return out / "r.csv"


@writes("TSV")
def _(out: Path, e: Examples) -> Path:
    pandas = pytest.importorskip("pandas")
    values = [{"id": r.id, "images": [r.image], "messages": dialogue(r.question, r.answer)} for r in e.rows]
    pandas.DataFrame(values).to_csv(out / "r.tsv", index=False, sep="\t")
    return out / "r.tsv"


@writes("parquet")
def _(out: Path, e: Examples) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for part in range(3):
        table = pyarrow.Table.from_pylist(nested(e)[8 * part : 8 * part + 8])
        parquet.write_table(table, out / f"train-{part:05}-of-00003.parquet", row_group_size=3)
    return out


@writes("parquet of pandas")
def _(out: Path, e: Examples) -> Path:
    pandas = pytest.importorskip("pandas")
    values = [
        {"id": r.id, "photo": e.bytes_of(r), "question": r.question, "answer": r.answer} for r in e.rows
    ]
    pandas.DataFrame(values).to_parquet(out / "r.parquet")
    return out / "r.parquet"


@writes("save_to_disk")
def _(out: Path, e: Examples) -> Written:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "question": datasets.Value("string"),
         "label": datasets.ClassLabel(names=[r.answer for r in e.rows])}
    )  # fmt: skip
    values = [
        {"id": r.id, "image": {"bytes": e.bytes_of(r), "path": None}, "question": r.question, "label": n}
        for n, r in enumerate(e.rows)
    ]
    dataset = datasets.Dataset.from_list(values, features=features)
    dataset.save_to_disk(str(out / "saved"), num_shards=2)
    return out / "saved"


@writes("WebDataset")
def _(out: Path, e: Examples) -> Path:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=7, verbose=0) as writer:
        for r in e.rows:
            writer.write(
                {"__key__": r.id, "png": e.bytes_of(r),
                 "json": {"image": "gone.png", "conversations": turns(r, ("human", "gpt"))}}
            )  # fmt: skip
    return out


@writes("WebDataset of captions", asked("Describe the picture."))
def _(out: Path, e: Examples) -> Path:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(out / "r.tar")) as writer:
        for r in e.rows:
            writer.write({"__key__": f"deep/{r.id}", "jpg": e.bytes_of(r), "txt": r.answer})
    return out / "r.tar"


KEYS_IN_FOLDERS = {"WebDataset of captions": "deep/"}


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_gives_the_rows_of_llava_json(
    name: str, examples: Examples, learned: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    written = WRITERS[name](out, examples)
    path, mapping = written if isinstance(written, tuple) else (written, None)
    rows = Rows(path, mapping=mapping)
    expected_rows = [CHANGES[name](row) if name in CHANGES else row for row in examples.rows]
    expected = llava(expected_rows, tmp_path / "expected.json")
    finder = ImageFinder(examples.folder)
    assert len(rows) == len(expected) == 24
    assert [learned(row, finder) for row in rows] == [learned(row, finder) for row in expected]
    if name not in WITHOUT_IDS | {"VQA v2", "COCO captions", "COCO instances", "a folder for each class"}:
        prefix = KEYS_IN_FOLDERS.get(name, "")
        assert [row.id for row in rows] == [prefix + row.id for row in expected]
    assert len({row.id for row in rows}) == 24
    # What training knows beforehand: all are usable, and rows that show equal pictures are known.
    assert rows.contents.usable.all()
    groups = [rows.contents.image_sets.tolist().index(s) for s in rows.contents.image_sets.tolist()]
    if name != "a folder for each class":
        assert groups == [n // 2 * 2 for n in range(24)]


@pytest.mark.parametrize("name", ["VQA v2", "COCO captions", "COCO instances"])
def test_lists_in_an_object_may_follow_a_byte_order_mark(
    name: str, examples: Examples, tmp_path: Path
) -> None:
    written = WRITERS[name](tmp_path, examples)
    path, mapping = written if isinstance(written, tuple) else (written, None)
    expected = list(Rows(path, mapping=mapping))
    for file in tmp_path.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert list(Rows(path, mapping=mapping)) == expected


def test_the_table_of_the_documentation_has_a_test_for_each_line() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    table = text.split("| format |", 1)[1].split("\n\n", 1)[0]
    names = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    assert [name for name in names if not name.startswith("-")] == list(WRITERS)
