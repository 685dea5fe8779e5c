"""Whether the pictures mattered: what an answer's words lose when the pictures are taken away.

Knows: a Llava, a processor's prompts and what a person shows. Does not know: attention, maps, pages.

Two ways to take a picture away. *grey*: every picture becomes a plain one of its own size, so that the
prompt keeps its length and form; of several plain ones (`PLAIN`) the one counts that makes the whole answer
likeliest, since any of them may happen to suggest something. *dropped*: its tokens are left out, a prompt of
another kind, which a model may answer in another manner even where it sees nothing; told, but not judged by.

Shapes: n tokens of the answer, W words, R regions on a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pumice.conversation import Conversation, ImagePart, Message

# Nats per word that an answer must lose, on average over its words, when its pictures become grey, to be said
# to lean on them. docs/explaining.md says what was measured around it.
THRESHOLD = 0.3

# The plain pictures: brightness as a multiple of the policy's mean colour, and how much noise (standard
# deviation, of 255), because a tower may find an even surface stranger than a photograph's.
PLAIN = ((0.85, 0.0), (1.15, 4.0))


@dataclass(frozen=True)
class Reliance:
    """Log-probabilities of each word (W,), in nats, given the words before it: as it was answered, and again
    with every picture dropped and with every picture grey (the likeliest of `PLAIN`).

    dropped is grey where the template has no prompt without pictures (stage 1's).
    share (W,): of attention that goes to the pictures' tokens, mean over layers and heads.
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
        """One sentence for people."""
        if not len(self.shown):
            return "There are no words, so nothing to lean on the picture."
        told = f"{self.score:.2f} nats per word"
        if self.leans:
            return f"This answer leans on the picture: without it, it loses {told}."
        lost = f"{told}, less than {THRESHOLD:g}" if self.score > 0 else "nothing"
        return (
            f"This answer does not lean on the picture: without it, it loses {lost}; "
            "the question's words alone would nearly do."
        )


def plain_picture(
    size: tuple[int, int], color: tuple[int, int, int], brightness: float, noise: float
) -> Image.Image:
    """One of `PLAIN`; the same every time."""
    if not noise:
        return Image.new("RGB", size, tuple(min(255, round(c * brightness)) for c in color))
    scale = min(1.0, 512 / max(size))  # millions of random numbers would take longer than the model
    width, height = (max(1, round(n * scale)) for n in size)
    grain = np.random.default_rng(0).normal(0, noise, (height, width, 3))
    values = np.array(color, np.float32) * brightness + grain
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def without_pictures(conversation: Conversation) -> Conversation:
    """The same conversation with its pictures left out; a message of pictures alone keeps an empty text."""
    return Conversation(
        tuple(
            Message(m.role, tuple(p for p in m.parts if not isinstance(p, ImagePart)) or ("",))
            for m in conversation.messages
        )
    )


def with_pictures(conversation: Conversation, pictures: Sequence[Image.Image]) -> Conversation:
    """The same conversation with other pictures in the places of its own, in order."""
    new = iter(pictures)
    return conversation.with_sources(lambda _: next(new))


def occluded(
    picture: Image.Image, regions: int, color: tuple[int, int, int]
) -> Iterator[tuple[int, int, Image.Image]]:
    """Copies of a picture with one of regions x regions equal rectangles filled: (row, column, copy)."""
    columns = np.linspace(0, picture.width, regions + 1).round().astype(int).tolist()
    rows = np.linspace(0, picture.height, regions + 1).round().astype(int).tolist()
    for row in range(regions):
        for column in range(regions):
            copy = picture.copy()
            box = (columns[column], rows[row], columns[column + 1], rows[row + 1])
            if box[2] > box[0] and box[3] > box[1]:
                copy.paste(color, box)
            yield row, column, copy
