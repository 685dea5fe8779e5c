"""Captions: for alignment, and as short answers."""

from __future__ import annotations

from collections.abc import Sequence

from rows import prompts
from rows.base import Photo, Row, casual, rng, row

FIRST_PROMPT_CAPTIONS = 3


def align_rows(photos: Sequence[Photo]) -> list[Row]:
    """Every caption as one row whose question is the picture alone (stage 1)."""
    return [
        row(f"align-{photo.name}-{number}", photo.image, [("", caption)])
        for photo in photos
        for number, caption in enumerate(photo.captions)
    ]


def caption_rows(photos: Sequence[Photo], seed: int) -> list[Row]:
    """Short captions under two prompts per photo, so that rows share their beginnings."""
    rows = []
    for photo in photos:
        random_ = rng(seed, "captions", photo.name)
        asked = [casual(prompt, random_) for prompt in random_.sample(prompts.CAPTION, 2)]
        captions = list(photo.captions)
        random_.shuffle(captions)
        for number, caption in enumerate(captions):
            prompt = asked[0] if number < FIRST_PROMPT_CAPTIONS else asked[1]
            rows.append(row(f"caption-{photo.name}-{number}", photo.image, [(prompt, caption)]))
    return rows
