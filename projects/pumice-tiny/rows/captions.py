"""Captions: for alignment, and as short answers."""

from __future__ import annotations

from collections.abc import Sequence

from pumice.evaluate.metrics.cider import Cider
from rows import prompts
from rows.base import Photo, Row, casual, rng, row

KEPT = 3  # captions per photograph, those that agree best with the others


def align_rows(photos: Sequence[Photo]) -> list[Row]:
    """Every caption as one row whose question is the picture alone (stage 1)."""
    return [
        row(f"align-{photo.name}-{number}", photo.image, [("", caption)])
        for photo in photos
        for number, caption in enumerate(photo.captions)
    ]


def caption_rows(photos: Sequence[Photo], seed: int) -> tuple[list[Row], list[Row]]:
    """The captions that say what the others say too, under one prompt per photo, so that they share it.

    Returns rows of every photo's best KEPT captions, and rows of the best one alone (stage 3).
    """
    rows, best = [], []
    for photo, captions in zip(photos, agreeing(photos), strict=True):
        random_ = rng(seed, "captions", photo.name)
        prompt = casual(random_.choice(prompts.CAPTION), random_)
        for number, caption in enumerate(captions[:KEPT]):
            rows.append(row(f"caption-{photo.name}-{number}", photo.image, [(prompt, caption)]))
        best.append(row(f"consensus-{photo.name}-0", photo.image, [(prompt, captions[0])]))
    return rows, best


def agreeing(photos: Sequence[Photo]) -> list[list[str]]:
    """Each photo's captions, first the one that scores the highest CIDEr against the others."""
    ranked: list[list[tuple[float, int]]] = [[] for _ in photos]
    for number in range(max((len(photo.captions) for photo in photos), default=0)):
        rivals = [i for i, photo in enumerate(photos) if len(photo.captions) > max(number, 1)]
        others = [[c for n, c in enumerate(photos[i].captions) if n != number] for i in rivals]
        scores = Cider(others).score([photos[i].captions[number] for i in rivals])
        for i, score in zip(rivals, scores, strict=True):
            ranked[i].append((-score, number))
    return [
        [photo.captions[number] for _, number in sorted(scores)] or list(photo.captions)
        for photo, scores in zip(photos, ranked, strict=True)
    ]
