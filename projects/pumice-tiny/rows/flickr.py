"""Reads the photographs: Flickr8k with cleaned captions, split by file name."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from pumice.errors import official
from rows.base import Photo, capital, held_names

FOLDER = "flickr8k"
VALIDATION_PHOTOS = 500
_BROKEN_END = re.compile(r"\b(a|an|the|and|or|of|at|in|on|with|to|from|by|is|are|his|her|their|its|while)\.$")


def clean_caption(text: str) -> str | None:
    """One tidy sentence: capital first, one full stop last; None for one that is broken or tells sides."""
    text = text.replace("\u2019", "'").replace("`", "'").replace('"', " ")
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"\s+('s|n't|'re|'ll)\b", r"\1", text)
    text = re.sub(r"([,;])(?=[A-Za-z])", r"\1 ", text)
    text = text.strip(" .,;:!?-") + "."
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 4 or _BROKEN_END.search(text.lower()):
        return None
    if re.search(r"\b(left|right)\b", text.lower()):  # training mirrors pictures
        return None
    if sum(word.isupper() and len(word) > 1 for word in words) > len(words) / 2:
        text = text.lower()
    return capital(text)


def read_photos(photos: Path) -> list[Photo]:
    """All photographs with at least one whole caption, in order of name. Raises InputError."""
    chosen = []
    for image, texts in raw_captions(photos).items():
        captions = tuple(dict.fromkeys(c for c in map(clean_caption, texts) if c is not None))
        if captions:
            chosen.append(Photo(Path(image).stem, image, captions))
    return sorted(chosen, key=lambda photo: photo.name)


def raw_captions(photos: Path) -> dict[str, list[str]]:
    """Every caption as it was written, by picture path: what a caption score compares with.

    Raises InputError where the file is not as COCO writes it.
    """
    path = photos / FOLDER / "captions.json"
    captions: dict[str, list[str]] = defaultdict(list)
    with official(lambda: f"'{path}'"):
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: f"{FOLDER}/images/{image['file_name']}" for image in content["images"]}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"].strip())
    return dict(captions)


def split(photos: list[Photo], validation: int = VALIDATION_PHOTOS) -> tuple[list[Photo], list[Photo]]:
    """(training, validation): the validation photos have the smallest SHA-256 of their name."""
    held = held_names((photo.name for photo in photos), validation)
    return [p for p in photos if p.name not in held], [p for p in photos if p.name in held]
