"""projects/pumice-tiny/build.py: rows are split, repeatable, and show crops where they stay right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from pumice.errors import InputError


def make_photos(root: Path, number: int) -> None:
    """A small picture folder in the layout of the real one."""
    captions = (
        "A brown dog runs through the snow .",
        "A dog is running in the snow .",
        "The dog plays in deep white snow .",
        "A man in a red shirt rides a bike down a street .",
        "A man is riding a bike on a street .",
    )
    images, annotations = [], []
    (root / "flickr8k" / "images").mkdir(parents=True)
    for n in range(number):
        name = f"{n:03}.jpg"
        Image.new("RGB", (32, 32), (n * 7 % 256, 90, 90)).save(root / "flickr8k" / "images" / name)
        images.append({"id": n, "file_name": name})
        start = 0 if n % 2 else 3
        for k, text in enumerate(captions[start : start + 3]):
            annotations.append({"id": 5 * n + k, "image_id": n, "caption": text})
    content = {"images": images, "annotations": annotations}
    (root / "flickr8k" / "captions.json").write_text(json.dumps(content))
    folder = root / "imagenet-one-per-class" / "images"
    folder.mkdir(parents=True)
    labels = []
    for key, name in (("n02099601", "golden retriever"), ("n01440764", "tench"), ("n03594734", "jean")):
        Image.new("RGB", (32, 32)).save(folder / f"{key}.jpg")
        labels.append({"file_name": f"{key}.jpg", "wordnet_id": key, "name": name})
    (folder.parent / "labels.json").write_text(json.dumps(labels))


def read_all(folder: Path) -> dict[str, list[Any]]:
    return {
        path.relative_to(folder).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.rglob("*.jsonl"))
    }


def test_end_to_end(build: ModuleType, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", 24)
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        build.build(tmp_path / "photos", out, seed=5, composites={"train": 6, "val": 2}, validation=6)
    first, second = (read_all(out) for out in outs)
    assert first == second  # the seed decides everything
    asked = [
        {e["conversations"][0]["value"] for e in first[f"{part}/text_only.jsonl"]}
        for part in ("train", "val")
    ]
    assert not asked[0] & asked[1]
    held = {entry["image"] for entry in json.loads((outs[0] / "val" / "captions.json").read_text())}
    assert len(held) == 6
    ids: set[str] = set()
    for name, entries in first.items():
        if name == "val/presence.jsonl":
            assert Counter(e["answer"] for e in entries).keys() <= {"yes", "no"}
            assert {e["image"] for e in entries} <= held
            continue
        for entry in entries:
            speakers = [turn["from"] for turn in entry["conversations"]]
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)
            assert all(turn["value"].strip() for turn in entry["conversations"])
            text = json.dumps(entry["conversations"])
            assert "{" not in text.replace('{"from"', "") and text.count("<image>") == ("image" in entry)
            if "image" in entry:
                assert (tmp_path / "photos" / entry["image"]).exists() or (outs[0] / entry["image"]).exists()
            if name.startswith("train/"):
                assert entry.get("image") not in held
                assert (name, entry["id"]) not in ids
                ids.add((name, entry["id"]))
    answers = {turn["value"] for e in first["train/naming.jsonl"] for turn in e["conversations"]}
    assert any("a golden retriever" in a.lower() for a in answers) and any(
        "a pair of jeans" in a for a in answers
    )
    summary = json.loads((outs[0] / "summary.json").read_text())
    assert summary["train/captions"]["pictures"] == 18


def make_coco(root: Path, count: int) -> None:
    """Photographs of dogs and cats in COCO's files: all labelled, some captioned, boxed, asked and stated."""
    folder = root / "coco"
    folder.mkdir()
    names = [f"{number:012}.jpg" for number in range(count)]
    animals = ["dog" if number % 2 else "cat" for number in range(count)]
    pairs = list(zip(names, animals, strict=True))
    images = [{"id": number, "file_name": name} for number, name in enumerate(names[: count // 2])]
    captions = [
        {"image_id": image["id"], "caption": f"a {pairs[image['id']][1]} {verb} on a bed"}
        for image in images
        for verb in ("sleeps", "sits", "rests")
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    lines = {
        "labels": [{"image": name, "labels": [animal, "bed"]} for name, animal in pairs],
        "objects": [
            {"image": n, "objects": [{"name": a, "box": [0.1, 0.1, 0.3, 0.5]}], "complete": True}
            for n, a in pairs
        ],
        "vqa": [
            {
                "question_id": n,
                "image": n,
                "question": f"What animal {n}?",
                "answers": [a] * 10,
                "answer_type": "other",
            }
            for n, a in pairs
        ],
        "vsr": [{"image": n, "statement": f"The {a} is on the bed.", "label": True} for n, a in pairs],
    }
    for name, entries in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def test_coco_is_read_split_and_written_beside_the_rest(build: ModuleType, tmp_path: Path) -> None:
    make_photos(tmp_path, 12)
    make_coco(tmp_path, 20)
    out = tmp_path / "out"
    build.build(tmp_path, out, composites={}, validation=4, coco_validation=6)
    written = read_all(out)
    for source in ("captions", "presence", "list", "naming", "counting", "sides", "statements"):
        assert written[f"train/coco_{source}.jsonl"], source
    held = {entry["image"] for entry in written["val/coco_list.jsonl"]}
    assert len(held) == 6
    for name, entries in written.items():
        if name.startswith("train/"):
            assert held.isdisjoint(entry.get("image") for entry in entries), name
    asked_of = {entry["image"] for entry in written["val/vqa_test.jsonl"]}
    captioned = {e["image"] for e in json.loads((out / "val" / "coco_captions.json").read_text())}
    assert asked_of == held and captioned <= held
    answers = Counter(entry["answer"] for entry in written["val/coco_presence.jsonl"])
    assert answers["yes"] == answers["no"] > 0


def test_training_rows_show_crops_where_they_stay_right(rows: Any, tmp_path: Path) -> None:
    image = "coco/images/a.jpg"
    (tmp_path / image).parent.mkdir(parents=True)
    Image.effect_noise((64, 48), 90).save(tmp_path / image)

    def shown(share: float, seed: int) -> dict[str, str]:
        sources = {
            f"{source}/{question}": rows.base.row(source, image, [(question, "Dogs.")])
            for source in ("train/captions", "train/coco_list", "train/vqa_numbers", "val/captions")
            for question in ("What is there?", "How many dogs are there?", "Who is on the left?")
        }
        by_source: dict[str, list[Any]] = {}
        for row in sources.values():
            by_source.setdefault(row["id"], []).append(row)
        rows.crops.crop_pictures(by_source, tmp_path, tmp_path / "out", share, seed)
        return {name: row["image"] for name, row in sources.items()}

    pictures = shown(1, 3)
    cropped = {name for name, path in pictures.items() if path == f"crops/3/{image}"}
    assert cropped == {"train/captions/What is there?", "train/coco_list/What is there?"}
    assert {pictures[name] for name in pictures.keys() - cropped} == {image}
    with Image.open(tmp_path / "out" / f"crops/3/{image}") as made, Image.open(tmp_path / image) as whole:
        assert made.size == whole.size and made.convert("L").tobytes() != whole.convert("L").tobytes()
    assert set(shown(0, 4).values()) == {image} and not (tmp_path / "out" / "crops" / "4").exists()


def test_crops_are_of_the_upright_photograph(rows: Any, tmp_path: Path) -> None:
    """As the whole one is shown. Its EXIF may say that the camera was turned."""
    image = "coco/images/a.jpg"
    (tmp_path / image).parent.mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / image, exif=turned)
    sources = {"train/captions": [rows.base.row("r", image, [("What is there?", "Dogs.")])]}
    rows.crops.crop_pictures(sources, tmp_path, tmp_path, 1, 0)
    with Image.open(tmp_path / f"crops/0/{image}") as made:
        assert made.size == (48, 64)


def test_a_wrong_share_of_crops_is_refused_before_anything_is_written(
    build: ModuleType, tmp_path: Path
) -> None:
    make_photos(tmp_path / "photos", 12)
    for share in (1.5, -0.1, float("nan")):
        with pytest.raises(InputError, match=rf"--cropped is {share}; give a share between 0 and 1"):
            build.build(tmp_path / "photos", tmp_path / "out", composites={"train": 1}, cropped=share)
    assert not (tmp_path / "out").exists()


def test_photographs_without_categories_are_asked_nothing_about_them(
    build: ModuleType, tmp_path: Path
) -> None:
    make_photos(tmp_path, 12)
    make_coco(tmp_path, 20)
    for name in ("labels", "objects"):
        (tmp_path / "coco" / f"{name}.jsonl").write_text("")
    build.build(tmp_path, tmp_path / "out", composites={}, validation=4, coco_validation=6)
    written = read_all(tmp_path / "out")
    assert written["val/coco_presence.jsonl"] == [] and written["train/coco_captions.jsonl"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels", '{"image": "a.jpg", "labels": ["unicorn"]}', "names unicorn, which is none of COCO's"),
        ("objects", '{"image": "a.jpg", "complete": true}', r"objects\.jsonl', line 1 lacks objects"),
        (
            "vqa",
            '\n{"image": "a.jpg", "question": "Why?"}',
            r"vqa\.jsonl', line 2 lacks question_id, ans",
        ),
        ("vsr", "[]", r"vsr\.jsonl', line 1 lacks image, statement, label"),
        ("vsr", '{"image": ', r"vsr\.jsonl', line 1: column \d+: it ends too early"),
    ],
)
def test_a_wrong_file_of_coco_is_named(rows: Any, tmp_path: Path, file: str, text: str, message: str) -> None:
    make_coco(tmp_path, 2)
    (tmp_path / "coco" / f"{file}.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        rows.coco.read_coco(tmp_path)


def test_captions_of_an_unknown_photograph_are_refused(rows: Any, tmp_path: Path) -> None:
    content = {"images": [], "annotations": [{"image_id": 7, "caption": "a dog"}]}
    for read, name in ((rows.coco.read_coco, "coco"), (rows.flickr.read_photos, "flickr8k")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "captions.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=rf"{name}.captions\.json': its fields are not the official"):
            read(tmp_path)


def test_a_line_ends_only_where_json_ends_it(rows: Any, build: ModuleType, tmp_path: Path) -> None:
    """Rows are written as people wrote them, also with what `splitlines` takes for the end of a line."""
    text = "one\u2028two\x85three"
    build.write({"rows": [{"text": text}]}, tmp_path)
    assert rows.base.read_lines(tmp_path / "rows.jsonl", "text") == [{"text": text}]
