"""The mixture: each task's official format as LLaVA-1.5's rows, sampling, order, manifest, wrong files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pumice.cli import app
from pumice.data.rows import Rows
from pumice.errors import InputError
from pumice.synth.mix.build import Mix, build, load
from pumice.synth.mix.readers import LETTER, READERS, SHORT, Reader

FILES: dict[str, Any] = {
    "vq.json": {"questions": [
        {"image_id": 9, "question": "What is it?", "question_id": 90},
        {"image_id": 8, "question": "Where?", "question_id": 80},
        {"image_id": 9, "question": "How many?", "question_id": 91},
    ]},
    "va.json": {"annotations": [
        {"question_id": 80, "multiple_choice_answer": "beach"},
        {"question_id": 91, "multiple_choice_answer": "2"},
        {"question_id": 90, "answers": [{"answer": "cat"}, {"answer": "dog"}, {"answer": "dog"}]},
    ]},
    "gqa.json": {"1": {"question": "Is it red?", "imageId": "n5", "answer": "no"}},
    "aok.json": [
        {"image_id": 4, "question_id": "q", "question": "Why?", "choices": ["a", "b", "c", "d"],
         "correct_choice_idx": 2}
    ],
    "ocr.json": {
        "b1": {"imageURL": "http://x/y.gif", "split": 1, "questions": ["Who wrote it?", "Genre?"],
               "answers": ["Me", "Art"]},
        "b2": {"imageURL": "http://x/z.jpg", "questions": ["Q?"], "answers": ["A"], "split": 3},
    },
    "caps.json": {"data": [{"image_id": "t1", "caption_str": text} for text in ("A sign.", "A board.")]},
    "tokens.json": {"data": [{"image_id": "t1", "ocr_tokens": ["STOP", "NOW"]}]},
    "inst.json": {
        "images": [{"id": 3, "file_name": "COCO_train2014_000000000003.jpg", "width": 200, "height": 100}],
        "annotations": [{"id": 31, "bbox": [20, 10, 100, 50]}],
    },
    "regions.json": [
        {"id": 2, "regions": [
            {"region_id": n, "phrase": f"thing {n}", "x": 0, "y": 0, "width": 50, "height": 50}
            for n in range(15)
        ]}
    ],
    "sizes.json": [{"image_id": 2, "url": "https://x/VG_100K/2.jpg", "width": 100, "height": 100}],
    "chats.json": [
        {"id": "c", "conversations": [
            {"from": "gpt", "value": "lost"},
            {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"},
            {"from": "human", "value": "More?"}, {"from": "gpt", "value": "x" * 9000},
        ]},
        {"id": "d", "conversations": [{"from": "human", "value": "A"}, {"from": "human", "value": "B"}]},
    ],
    "llava.json": [
        {"id": str(n), "image": f"{n}.jpg", "conversations": [
            {"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": f"Number {n}."}]}
        for n in range(20)
    ],
}  # fmt: skip
REFS = [
    {"ref_id": 1, "ann_id": 31, "image_id": 3, "split": "train",
     "sentences": [{"sent": f"thing {n}", "sent_id": n} for n in range(12)]},
    {"ref_id": 2, "ann_id": 99, "image_id": 3, "split": "val", "sentences": []},
]  # fmt: skip


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], list[Any]]]:
    """Build a mixture from sources; the manifest and the rows."""
    monkeypatch.chdir(tmp_path)
    for name, values in FILES.items():
        Path(name).write_text(json.dumps(values))
    Path("refs.p").write_bytes(pickle.dumps(REFS, protocol=2))

    def make(*sources: Any, out: str = "mix.jsonl", **more: Any) -> tuple[dict[str, Any], list[Any]]:
        Path("mix.yaml").write_text(json.dumps({"sources": sources, **more}))  # JSON is YAML
        manifest = build(load(Path("mix.yaml")), Path(out))
        return manifest, list(Rows(Path(out))[:])

    return make


def turn_texts(row: Any) -> list[str]:
    return [text for _, text in row.turns]


def test_vqa(make: Any) -> None:
    source = {
        "task": "vqav2",
        "files": {"questions": "vq.json", "annotations": "va.json"},
        "images": "coco/train2017",
    }
    manifest, rows = make(source)
    by_image = {row.image[0]: turn_texts(row) for row in rows}
    assert by_image == {
        "coco/train2017/000000000009.jpg": ["<image>\nWhat is it?" + SHORT, "dog", "How many?", "2"],
        "coco/train2017/000000000008.jpg": ["<image>\nWhere?" + SHORT, "beach"],
    }
    [source_entry] = manifest["sources"]
    assert (
        source_entry["entries"],
        source_entry["available"],
        source_entry["rows"],
        source_entry["turns"],
    ) == (3, 2, 2, 3)
    digest = hashlib.sha256(Path("vq.json").read_bytes()).hexdigest()
    assert source_entry["files"][0] == {
        "role": "questions",
        "file": "vq.json",
        "bytes": Path("vq.json").stat().st_size,
        "sha256": digest,
    }
    assert manifest["file"]["sha256"] == hashlib.sha256(Path("mix.jsonl").read_bytes()).hexdigest()
    assert json.loads(Path("mix.jsonl.manifest.json").read_text()) == manifest


def test_gqa_ocr_and_captions(make: Any) -> None:
    _, rows = make(
        {"task": "gqa", "files": {"questions": "gqa.json"}},
        {"task": "ocrvqa", "files": {"dataset": "ocr.json"}},
        {"task": "textcaps", "files": {"captions": "caps.json", "ocr": "tokens.json"}},
        out="mix.json",
    )
    rows_by_image = {row.image[0]: turn_texts(row) for row in rows}
    assert rows_by_image["n5.jpg"] == ["<image>\nIs it red?" + SHORT, "no"]
    assert rows_by_image["b1.gif"] == ["<image>\nWho wrote it?" + SHORT, "Me", "Genre?", "Art"]
    question, caption = rows_by_image["t1.jpg"]
    assert (
        question
        == "<image>\nProvide a one-sentence caption for the provided image.\nReference OCR token: STOP, NOW"
    )
    assert caption in ("A sign.", "A board.")
    assert len(rows_by_image) == 3


def test_choices_turn_round(make: Any) -> None:
    _, rows = make({"task": "aokvqa", "files": {"questions": "aok.json"}})
    assert len(rows) == 4
    for row in rows:
        question, letter = turn_texts(row)
        assert question.endswith(LETTER)
        assert f"\n{letter}. c\n" in question
    assert {turn_texts(row)[1] for row in rows} == set("ABCD")


@pytest.mark.parametrize(
    ("boxes", "location"), [("padded", "[0.10, 0.30, 0.60, 0.55]"), ("picture", "[0.10, 0.10, 0.60, 0.60]")]
)
def test_refcoco(make: Any, boxes: str, location: str) -> None:
    _, rows = make({"task": "refcoco", "files": {"refs": ["refs.p"], "instances": "inst.json"}}, boxes=boxes)
    assert sorted(len(row.turns) // 2 for row in rows) == [3, 9]
    assert {row.image for row in rows} == {("000000000003.jpg",)}
    texts = [text.removeprefix("<image>\n") for row in rows for text in turn_texts(row)]
    asked = [text for text in texts if text.startswith("Please provide")]
    assert {text.split(":")[0] for text in asked} == {
        "Please provide a short description for this region",
        "Please provide the bounding box coordinate of the region this sentence describes",
    }
    assert sum(location in text for text in texts) == 12


def test_a_pickle_of_code_is_refused(make: Any) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch pwned",)

    source = {"task": "refcoco", "files": {"refs": ["evil.p"], "instances": "inst.json"}}
    Path("evil.p").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(InputError, match=r"the pickle names the code posix\.system; only plain data is read"):
        make(source)
    assert not Path("pwned").exists()
    Path("evil.p").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is no whole pickle"):
        make(source)


def test_visual_genome_and_chats(make: Any) -> None:
    _, rows = make(
        {"task": "vg", "files": {"regions": "regions.json", "images": "sizes.json"}, "images": "vg"},
        {"task": "sharegpt", "files": {"chats": "chats.json"}},
    )
    rows_by_image = {row.image: turn_texts(row) for row in rows}
    assert len(rows_by_image["vg/VG_100K/2.jpg",]) == 20
    assert rows_by_image[()] == ["Hello", "Hi"]


def test_weights_rows_and_seeds(make: Any) -> None:
    source = {"task": "llava", "files": {"rows": "llava.json"}}

    def ids(seed: int = 0, **more: Any) -> list[str]:
        return [row.id for row in make({**source, **more}, seed=seed)[1]]

    assert sorted(ids()) == sorted(f"llava/{n}" for n in range(20))
    assert ids() == ids() != ids(seed=1)
    assert len(ids(weight=0.5)) == 10
    assert set(ids(weight=0.5)) != set(ids(weight=0.5, seed=1))
    assert len(ids(rows=3)) == 3
    twice = ids(weight=2.1)
    assert len(twice) == len(set(twice)) == 42
    assert sum(name.endswith("+1") for name in twice) == 20
    _, rows = make(source)
    assert turn_texts(rows[0])[0] == "<image>\nDescribe it."


def test_full_files_are_compared(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"task": "gqa", "files": {"questions": "gqa.json"}}
    manifest, _ = make(source)
    assert manifest["sources"][0]["reference"] == {"rows": 72140, "full": False, "sentence": ""}
    assert sum(reader.rows for reader in READERS.values()) == 665_298
    gqa_reader = READERS["gqa"]
    monkeypatch.setitem(READERS, "gqa", Reader(gqa_reader.read, gqa_reader.needs, 2, 1, True))
    result = CliRunner().invoke(app, ["data", "mix", "mix.yaml", "mix.jsonl"])
    assert result.exit_code == 1
    assert "gqa: the 1 entries of the full file give 1 rows, LLaVA-1.5 has 2" in result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"task": "poem", "files": {}}, "there is no task 'poem'; use one of llava, sharegpt"),
        ({"task": "gqa", "files": {}}, "gqa needs the file 'questions'; add it to files"),
        ({"task": "gqa", "files": {"questions": "none.json"}}, "the file 'none.json' of gqa does not exist"),
        ({"task": "gqa", "files": {"questions": "gqa.json", "x": "gqa.json"}},
         "gqa has no file 'x'; its files are questions"),
        ({"task": "gqa", "files": {"questions": "gqa.json"}, "wieght": 2}, "sources.0.wieght: Extra inputs"),
        ({"task": "gqa", "files": {"questions": "gqa.json"}, "rows": 5},
         "5 rows are asked for, its files give 1"),
        ({"task": "gqa", "files": {"questions": "gqa.json"}, "weight": 0.1}, "takes none; raise it"),
        ({"task": "gqa", "files": {"questions": "ocr.json"}}, "question b1 lacks answer or imageId"),
        ({"task": "vqav2", "files": {"questions": "vq.json", "annotations": "caps.json"}},
         "question 90 has no answer"),
    ],
)  # fmt: skip
def test_wrong_recipes(make: Any, source: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make(source)
    assert message in str(error.value)
    assert not Path("mix.jsonl").exists()


def test_the_command(make: Any) -> None:
    make({"task": "llava", "files": {"rows": "llava.json"}})
    result = CliRunner().invoke(app, ["data", "mix", "mix.yaml", "out.json", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "rows of llava: 20 of 20 (LLaVA-1.5 has 157,712)\nrows in out.json: 20" in result.stdout
    refused = CliRunner().invoke(app, ["data", "mix", "mix.yaml", "out.txt"])
    assert (refused.exit_code, "is neither .json nor .jsonl" in refused.stderr) == (2, True)
    before = Path("llava.json").read_bytes()
    refused = CliRunner().invoke(app, ["data", "mix", "mix.yaml", "llava.json"])
    assert (refused.exit_code, "'llava.json' is a file to be mixed" in refused.stderr) == (2, True)
    assert Path("llava.json").read_bytes() == before


def test_the_recipe_in_the_docs_is_one() -> None:
    """The whole mixture of LLaVA-1.5, every task of it."""
    page = Path(__file__).parents[2] / "docs" / "instruction-data.md"
    text = (
        page.read_text(encoding="utf-8")
        .partition("pumice data mix mix.yaml")[2]
        .split("```yaml")[1]
        .split("```")[0]
    )
    mix = Mix.model_validate(yaml.safe_load(text))
    assert sorted(source.task for source in mix.sources) == sorted(READERS)
    for source in mix.sources:
        assert set(READERS[source.task].needs) <= set(source.files)


def test_fields_that_differ_from_the_official_ones(make: Any) -> None:
    Path("ocr.json").write_text(json.dumps({"b1": {"split": 1, "questions": 7}}))
    with pytest.raises(InputError, match="ocrvqa, entry 1: its fields are not the official ones"):
        make({"task": "ocrvqa", "files": {"dataset": "ocr.json"}})
    assert not Path("mix.jsonl").exists()
