"""Rows from the training split of easy-vqa (PyPI, MIT): small pictures of one coloured shape.

Its test split is never read: it is for judging.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

from rows.base import SINGLE_PHRASE, Row, capital, rng, row
from rows.presence import SHORT_SUFFIXES

PICTURES = 1500
QUESTIONS_PER_PICTURE = 4


def easy_vqa_rows(package: Path, out: Path, seed: int, pictures: int = PICTURES) -> list[Row]:
    """Copy some pictures to `out`/easy-vqa and turn their questions into rows of short answers."""
    folder = package / "data" / "train"
    by_picture: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, number in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        by_picture[number].append((question, answer))
    random_ = rng(seed, "easy-vqa")
    (out / "easy-vqa").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in sorted(random_.sample(sorted(by_picture), min(pictures, len(by_picture)))):
        image = f"easy-vqa/{number}.png"
        shutil.copyfile(folder / "images" / f"{number}.png", out / image)
        asked = by_picture[number]
        for index, (question, answer) in enumerate(
            random_.sample(asked, min(QUESTIONS_PER_PICTURE, len(asked)))
        ):
            yes_no = answer in ("yes", "no")
            roll = random_.random()
            text = capital(question) if random_.random() < 0.6 else question
            if roll < 0.6:
                text += random_.choice(SHORT_SUFFIXES) if yes_no else SINGLE_PHRASE
            ending = "" if roll < 0.6 else "."
            rows.append(row(f"easy-vqa-{number}-{index}", image, [(text, capital(answer) + ending)]))
    return rows
