"""Photographs shown without a strip of their edges, so that a model cannot know them by heart."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from pumice.errors import InputError
from pumice.images import open_image
from rows.base import Row, rng
from rows.coco import tells_sides

# Sources that a crop leaves right, but for single rows that count things or tell sides.
SOURCES = (
    *("captions", "consensus", "describe", "happening", "presence", "refusal", "conversation", "objects"),
    *("coco_captions", "coco_consensus", "coco_describe", "coco_happening"),
    *("coco_presence", "coco_list", "coco_naming", "coco_follow_up", "coco_objects"),
)
FOLDERS = ("flickr8k/", "coco/")  # an ImageNet photograph may be filled by its one thing
LEAST = 0.6  # share of the picture that is kept
QUALITY = 92  # of JPEG


def crop(picture: Image.Image, random_: random.Random) -> Image.Image:
    """LEAST of the area or more, in another aspect ratio, at the size of the whole picture."""
    area, aspect = random_.uniform(LEAST, 1), math.exp(random_.uniform(-0.2, 0.2))
    width = min(picture.width, round(picture.width * math.sqrt(area * aspect)))
    height = min(picture.height, round(picture.height * math.sqrt(area / aspect)))
    left, top = random_.randint(0, picture.width - width), random_.randint(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box)


def check_share(share: float) -> None:
    """Raise InputError unless the share of photographs to crop is between 0 and 1."""
    if not 0 <= share <= 1:
        raise InputError(f"--cropped is {share}; give a share between 0 and 1")


def crop_pictures(
    sources: Mapping[str, Sequence[Row]], photos_root: Path, out: Path, share: float, seed: int
) -> None:
    """Let the training rows of SOURCES show a crop of this share of their photographs, one of each.

    Writes the crops below `out`/crops/SEED and changes `image` of the rows.
    """
    chosen: dict[str, str] = {}  # the photograph's path -> its crop's, or its own
    for source in SOURCES:
        for row in sources.get(f"train/{source}", ()):
            image = row["image"]
            if not image.startswith(FOLDERS) or _needs_whole(row):
                continue
            if image not in chosen:
                chosen[image] = _write(image, photos_root, out, share, seed)
            row["image"] = chosen[image]


def _needs_whole(row: Row) -> bool:
    """Whether the row counts things or tells sides, which a crop may change."""
    text = " ".join(turn["value"] for turn in row["conversations"])
    return re.search(r"\b(how many|number of)\b", text.lower()) is not None or tells_sides(text)


def _write(image: str, photos_root: Path, out: Path, share: float, seed: int) -> str:
    """Write a crop of the photograph, or none; returns the path that the rows show."""
    random_ = rng(seed, "crop", image)
    if random_.random() >= share:
        return image
    path = f"crops/{seed}/{image}"
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    crop(open_image(photos_root / image), random_).save(out / path, "JPEG", quality=QUALITY)
    return path
