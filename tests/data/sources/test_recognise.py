"""Which files of a folder, a pattern or a set on the hub are rows, and of which split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from samples import Examples, asked_about, jsonl, llava

from pumice.data.rows import ImageFinder, Rows
from pumice.data.sources.recognise import Part
from pumice.errors import InputError


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


def test_a_file_of_json_for_each_picture(examples: Examples, tmp_path: Path) -> None:
    values = {value["image"]: value for value in asked_about(examples)}
    for name, value in values.items():
        (examples.folder / name).with_suffix(".json").write_text(json.dumps(value, indent=1))
    rows, finder = Rows(examples.folder), ImageFinder(tmp_path)
    assert [row.id for row in rows] == [value["id"] for _, value in sorted(values.items())]
    assert rows[5].find(rows[5].image[0], finder) == examples.folder / "05.png"


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


def test_a_packed_file_of_another_split_is_not_looked_at(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"question": "What?", "answer": "A cat."}])
    (tmp_path / "test.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert len(Rows(tmp_path, part=Part("train"))) == 1
    with pytest.raises(InputError, match="is packed with gzip; unpack it first"):
        Rows(tmp_path, part=Part("test"))


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
