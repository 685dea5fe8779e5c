"""Every format of the table in docs/data.md, as the real libraries write it, gives the rows of LLaVA JSON."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from samples import Example, Examples, jsonl, llava

from pumice.data.mapping import RowMapping
from pumice.data.rows import ImageFinder, Rows
from pumice.data.sources import columns
from pumice.data.sources.recognise import Part
from pumice.errors import InputError
from pumice.images import open_image

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


def turns(row: Example, speakers: tuple[str, str], image: str = "<image>\n") -> list[dict[str, str]]:
    texts = (f"{image}{row.question}", row.answer)
    return [{"from": s, "value": t} for s, t in zip(speakers, texts, strict=True)]


def dialogue(question: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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


def nested(e: Examples) -> list[dict[str, Any]]:
    return [
        {
            "id": r.id,
            "image": {"bytes": e.bytes_of(r), "path": "same.png"},
            "conversations": turns(r, ("human", "gpt")),
        }
        for r in e.rows
    ]


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


def test_the_table_of_the_documentation_has_a_test_for_each_line() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    table = text.split("| format |", 1)[1].split("\n\n", 1)[0]
    names = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    assert [name for name in names if not name.startswith("-")] == list(WRITERS)


def asked_about(e: Examples, **more: Any) -> list[dict[str, Any]]:
    return [{"id": r.id, "image": r.image, "question": r.question, "answer": r.answer} | more for r in e.rows]


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


def test_a_table_of_pictures_whose_name_begins_large(examples: Examples, tmp_path: Path) -> None:
    shutil.copytree(examples.folder, tmp_path / "set" / "deep")
    text = "file_name,text\n" + "".join(f"{n:02}.png,A cat.\n" for n in range(12))
    (tmp_path / "set" / "deep" / "Metadata.csv").write_text(text)
    assert [row.image for row in Rows(tmp_path / "set")] == [(f"deep/{n:02}.png",) for n in range(12)]


def test_a_folder_of_classes_with_their_names_beside_it(examples: Examples, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        shutil.copytree(examples.folder, tmp_path / "set" / name)
    (tmp_path / "set" / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "set" / "desktop.ini").write_text("[.ShellClassInfo]\n")
    assert [row.turns[1][1] for row in Rows(tmp_path / "set")] == ["cat"] * 12 + ["dog"] * 12


@pytest.mark.parametrize("form", ["conversations", "texts", "messages"])
def test_a_list_as_the_json_of_a_tar(form: str, examples: Examples, tmp_path: Path) -> None:
    row = examples.rows[0]
    values: dict[str, list[dict[str, str]]] = {
        "conversations": turns(row, ("human", "gpt"), ""),
        "texts": [{"user": row.question, "assistant": row.answer}],
        "messages": dialogue(row.question, row.answer),
    }
    with tarfile.open(tmp_path / "r.tar", "w") as archive:
        for ending, data in (("png", examples.bytes_of(row)), ("json", json.dumps(values[form]).encode())):
            member = tarfile.TarInfo(f"a.{ending}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    [read] = Rows(tmp_path / "r.tar")
    assert [text.removeprefix("<image>").strip() for _, text in read.turns] == [row.question, row.answer]
    assert len(read.image) == 1


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


def test_a_file_of_json_for_each_picture(examples: Examples, tmp_path: Path) -> None:
    values = {value["image"]: value for value in asked_about(examples)}
    for name, value in values.items():
        (examples.folder / name).with_suffix(".json").write_text(json.dumps(value, indent=1))
    rows, finder = Rows(examples.folder), ImageFinder(tmp_path)
    assert [row.id for row in rows] == [value["id"] for _, value in sorted(values.items())]
    assert rows[5].find(rows[5].image[0], finder) == examples.folder / "05.png"


def test_a_packed_file_of_another_split_is_not_looked_at(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"question": "What?", "answer": "A cat."}])
    (tmp_path / "test.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert len(Rows(tmp_path, part=Part("train"))) == 1
    with pytest.raises(InputError, match="is packed with gzip; unpack it first"):
        Rows(tmp_path, part=Part("test"))


def test_a_table_that_belongs_to_a_sample(examples: Examples, tmp_path: Path) -> None:
    row = examples.rows[0]
    values = json.dumps({"question": row.question, "answer": row.answer}).encode()
    with tarfile.open(tmp_path / "r.tar", "w") as archive:
        for ending, data in (("png", examples.bytes_of(row)), ("json", values), ("csv", b"a,b\n1,2\n")):
            member = tarfile.TarInfo(f"chart.{ending}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert [read.turns[1] for read in Rows(tmp_path / "r.tar")] == [("gpt", row.answer)]


def test_splits_are_chosen_by_name(examples: Examples, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        llava(examples.rows[: 3 if split == "test" else 5], tmp_path / "set" / split / "rows.json")
    assert len(Rows(tmp_path / "set", part=Part(split="test"))) == 3
    assert len(Rows(tmp_path / "set" / "*" / "rows.json", part=Part(split="train"))) == 5
    for part, message in (
        (None, "has the splits test, train; say which, for example split: test"),
        (Part(split="dev"), "has no split 'dev'; it has test, train"),
        (Part(revision="v1"), "revision: v1 is for sets on the hub"),
        (Part(config="c"), "has no config 'c'; it has test, train"),
    ):
        with pytest.raises(ValueError, match=message):
            Rows(tmp_path / "set", part=part)
    # Beside a test split, files without a name of a split are for training.
    (tmp_path / "set" / "train").rename(tmp_path / "set" / "mine")
    assert len(Rows(tmp_path / "set", part=Part(split="train"))) == 5


@pytest.mark.parametrize("group", [3, 7, 24])
def test_rows_of_any_row_group_are_read_once_a_block(
    group: int, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of blocks of two, in any order: small row groups are read for each block, large ones once."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([r | {"day": date(2026, 1, 1)} for r in nested(examples)])
    parquet.write_table(table, tmp_path / "r.parquet", row_group_size=group)
    monkeypatch.setattr(columns, "BLOCK", 2)
    reads: list[tuple[int, int, int]] = []
    batches = columns._batches
    monkeypatch.setattr(columns, "_batches", lambda path, *a: reads.append(a) or batches(path, *a))
    rows = Rows(tmp_path / "r.parquet")
    for index in [*range(23, -1, -1), *range(24)]:
        row = rows[index]
        assert (row.id, row.image[0].load()) == (f"r{index}", examples.bytes_of(examples.rows[index]))
    assert rows.opened.record(0)["day"] == "2026-01-01"
    large = group > 2 * columns._LARGE
    assert len(reads) == (1 if large else len({(a // 2, a // group) for a in range(24)}))
    assert [row.id for row in pickle.loads(pickle.dumps(rows))] == [f"r{n}" for n in range(24)]


def on_hub(root: Path, card: str | None) -> Path:
    """The snapshot of a set in the hub client's cache, as a download leaves it."""
    repository = root / "datasets--owner--name"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    if card is not None:
        (snapshot / "README.md").write_text(card)
    return snapshot


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/first*
  - split: test
    path: [data/second*]
---
"""


@pytest.mark.parametrize("card", [CARD, None])
def test_a_set_on_the_hub(
    card: str | None, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = on_hub(tmp_path / "hub", card)
    names = ("first", "second") if card else ("train-0", "test-0")
    (snapshot / "data").mkdir()
    for name, rows in zip(names, (examples.rows[:5], examples.rows[5:8]), strict=True):
        llava(rows, snapshot / "data" / f"{name}.json")
    train, test = (Rows("hf://owner/name", part=Part(split=split)) for split in ("train", "test"))
    assert [row.id for row in train] == [f"r{n}" for n in range(5)]
    assert [row.id for row in test] == ["r5", "r6", "r7"]
    assert (train.label, train.source) == ("hf://owner/name", "name")
    with pytest.raises(
        ValueError, match="'hf://owner/name' has the splits test, train; say which, for example"
    ):
        Rows("hf://owner/name")
    with pytest.raises(ValueError, match="owner/other is not in the hub's cache and cannot be fetched"):
        Rows("hf://owner/other")
