"""Measure whether the images mattered: how much less likely an answer's words are without them.

There are two ways to take an image away. *grey*: each image becomes a plain one of the same size, so that the
prompt keeps its length and form. Several plain images are tried (`PLAIN`), because one may happen to suggest
something; the one counts that makes the whole answer most likely. *dropped*: the image tokens are left out.
This is another kind of prompt, which a model may answer differently for that reason alone, so it is reported
but does not decide.

Shapes: n tokens of the answer, W words, R regions on a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pumice.conversation import Conversation, ImagePart, Message

# An answer leans on its images if it loses at least this many nats per word when they become grey.
# docs/measurements/explaining.md shows the measurements.
THRESHOLD = 0.3

# The plain images: brightness as a multiple of the policy's mean colour, and standard deviation of noise (of
# 255). Noise, because an even surface may be stranger to a tower than a photograph.
PLAIN = ((0.85, 0.0), (1.15, 4.0))


_NUMBERS = dict(enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 2)) | {
    100: "a hundred"
}


@dataclass(frozen=True)
class Reliance:
    """Log-probabilities of each word (W,), in nats: with the images, without them, and with grey ones.

    dropped equals grey if the template has no prompt without images (stage 1). grey: of the most likely of
    `PLAIN`. share (W,): share of attention on the image tokens, mean over layers and heads.
    """

    shown: np.ndarray
    dropped: np.ndarray
    grey: np.ndarray
    share: np.ndarray

    @property
    def loss_dropped(self) -> np.ndarray:
        """(W,): how much less likely each word is when the pictures are dropped, nats."""
        return self.shown - self.dropped

    @property
    def loss_grey(self) -> np.ndarray:
        """(W,): how much less likely each word is when the pictures are grey, nats."""
        return self.shown - self.grey

    @property
    def score(self) -> float:
        """Nats per word that the whole answer loses with grey pictures; 0 for an empty answer."""
        return float(self.loss_grey.mean()) if len(self.shown) else 0.0

    @property
    def leans(self) -> bool:
        return self.score >= THRESHOLD

    @property
    def attention(self) -> float:
        """Share of attention that goes to the pictures, mean over the answer."""
        return float(self.share.mean()) if len(self.share) else 0.0

    def verdict(self) -> str:
        """Return one sentence for users."""
        if not len(self.shown):
            return "There are no words, so nothing to lean on the picture."
        change = f"when the picture is blank, a word of it is on average {likely(self.score)}"
        if self.leans:
            return f"This answer leans on the picture: {change}."
        return f"This answer does not lean on the picture: {change}; the question alone would nearly do."


def likely(loss: float) -> str:
    """Say a loss in nats as a person would: "about ten times less likely"."""
    factor, direction = math.exp(min(abs(loss), 20)), "less" if loss > 0 else "more"
    if factor < 1.1:
        return "as likely"
    if factor < 1.75:
        return f"a little {direction} likely"
    if factor < 2.5:
        return "about half as likely" if loss > 0 else "about twice as likely"
    if factor >= 1000:
        return f"more than a thousand times {direction} likely"
    rounded = round(factor) if factor < 10 else int(float(f"{factor:.1g}"))
    return f"about {_NUMBERS.get(rounded, rounded)} times {direction} likely"


def plain_picture(
    size: tuple[int, int], color: tuple[int, int, int], brightness: float, noise: float
) -> Image.Image:
    """Return a plain image of this size, the same on every call. brightness, noise: as in `PLAIN`."""
    if not noise:
        return Image.new("RGB", size, tuple(min(255, round(c * brightness)) for c in color))
    scale = min(1.0, 512 / max(size))  # millions of random numbers would take longer than the model runs
    width, height = (max(1, round(n * scale)) for n in size)
    grain = np.random.default_rng(0).normal(0, noise, (height, width, 3))
    values = np.array(color, np.float32) * brightness + grain
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def without_pictures(conversation: Conversation) -> Conversation:
    """Return the conversation without its images. A message that had only images gets an empty text."""
    return Conversation(
        tuple(
            Message(m.role, tuple(p for p in m.parts if not isinstance(p, ImagePart)) or ("",))
            for m in conversation.messages
        )
    )


def with_pictures(conversation: Conversation, pictures: Sequence[Image.Image]) -> Conversation:
    """Return the conversation with its images replaced by others, in order."""
    replacements = iter(pictures)
    return conversation.with_sources(lambda _: next(replacements))


def occluded(
    picture: Image.Image, regions: int, color: tuple[int, int, int]
) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield (row, column, copy): the image with one of regions x regions equal rectangles filled."""
    columns = np.linspace(0, picture.width, regions + 1).round().astype(int).tolist()
    rows = np.linspace(0, picture.height, regions + 1).round().astype(int).tolist()
    for row in range(regions):
        for column in range(regions):
            copy = picture.copy()
            box = (columns[column], rows[row], columns[column + 1], rows[row + 1])
            if box[2] > box[0] and box[3] > box[1]:
                copy.paste(color, box)
            yield row, column, copy
