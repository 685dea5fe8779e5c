"""Reads the COCO photographs: categories, captions, boxes, and what people asked and stated of them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pumice.errors import InputError, official, some
from rows.base import Photo, held_names, read_lines, table
from rows.flickr import clean_caption
from rows.nouns import Noun

FOLDER = "coco"
VALIDATION_PHOTOS = 400
# What COCO's word is not what people say.
SAID = {"tv": "TV", "mouse": "computer mouse", "remote": "remote control", "hair drier": "hair dryer"}


def _categories() -> tuple[dict[str, Noun], frozenset[str]]:
    """(category -> noun, the categories that labels alone may miss)."""
    nouns, small = {}, set()
    for kind, lines in table("coco").items():
        for line in lines:
            forms, _, size = (part.strip() for part in line.partition("|"))
            singular, plural = ("" if form.strip() == "-" else form.strip() for form in forms.split("/"))
            name = singular or plural
            nouns[name] = Noun(
                name, kind, ((SAID.get(singular, singular), plural),), frozenset(), frozenset()
            )
            if size == "small":
                small.add(name)
    return nouns, frozenset(small)


CATEGORIES, SMALL = _categories()


@dataclass(frozen=True)
class Box:
    """One thing: its category and its corners as shares of the picture's sides."""

    name: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Scene:
    """One photograph. labels: COCO's categories. boxes: every thing there. None where nobody told them."""

    photo: Photo
    labels: frozenset[str] | None
    boxes: tuple[Box, ...] | None
    vqa: tuple[dict[str, Any], ...]  # question, answers (ten), answer_type
    statements: tuple[dict[str, Any], ...]  # statement, label
    raw_captions: tuple[str, ...] = field(default=())

    def absent(self) -> list[str]:
        """Categories that are surely not there; small ones only where every thing has its box."""
        if self.labels is None:
            return []
        return [c for c in CATEGORIES if c not in self.labels and (self.boxes is not None or c not in SMALL)]


def read_coco(photos: Path) -> list[Scene]:
    """Every COCO photograph in order of name; [] where there is no folder of them.

    Raises InputError where a file is damaged, lacks a field, or names what is no category.
    """
    folder = photos / FOLDER
    if not folder.is_dir():
        return []
    captions: dict[str, list[str]] = defaultdict(list)
    with official(lambda: f"'{folder / 'captions.json'}'"):
        content = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[files[annotation["image_id"]]].append(annotation["caption"].strip())
    labelled = read_lines(folder / "labels.jsonl", "image", "labels")
    labels = {line["image"]: frozenset(line["labels"]) for line in labelled}
    boxed = read_lines(folder / "objects.jsonl", "image", "objects", "complete")
    boxes = {
        line["image"]: tuple(Box(thing["name"], *thing["box"]) for thing in line["objects"])
        for line in boxed
        if line["complete"]
    }
    named = {name for names in labels.values() for name in names}
    named |= {box.name for all_boxes in boxes.values() for box in all_boxes}
    if unknown := sorted(named - CATEGORIES.keys()):
        raise InputError(f"'{folder}' names {some(unknown)}, which is none of COCO's categories")
    vqa: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(
        folder / "vqa.jsonl", "question_id", "image", "question", "answers", "answer_type"
    ):
        vqa[line["image"]].append(line)
    statements: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(folder / "vsr.jsonl", "image", "statement", "label"):
        statements[line["image"]].append(line)
    return [
        Scene(
            Photo(Path(file).stem, f"{FOLDER}/images/{file}", _cleaned(captions[file])),
            labels.get(file),
            boxes.get(file),
            tuple(vqa[file]),
            tuple(statements[file]),
            tuple(captions[file]),
        )
        for file in sorted({*files.values(), *labels, *boxes, *vqa, *statements})
    ]


def _cleaned(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c for c in map(clean_caption, captions) if c is not None))


def split(scenes: list[Scene], validation: int = VALIDATION_PHOTOS) -> tuple[list[Scene], list[Scene]]:
    """(training, validation): the validation photographs have the smallest SHA-256 of their name."""
    held = held_names((scene.photo.name for scene in scenes), validation)
    train = [scene for scene in scenes if scene.photo.name not in held]
    return train, [scene for scene in scenes if scene.photo.name in held]


def tells_sides(text: str) -> bool:
    """Whether a mirrored picture would need another answer: sides, writing, clocks."""
    words = (
        r"\b(left|right|lefthand|righthand|letters?|words?|sign|signs|say|says|written|name|number on|time)\b"
    )
    return re.search(words, text.lower()) is not None
