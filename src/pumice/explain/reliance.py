"""Whether the pictures mattered: what an answer's words lose when the pictures are taken away.

Knows: a Llava, a processor's prompts and what a person shows. Does not know: attention, maps, pages.

Two ways to take a picture away, because each has its flaw. *dropped*: its tokens are left out, a prompt that
is shorter and of a kind that the model may hardly know. *grey*: every picture becomes a plain one of its
policy's mean colour and of its own size, so that the prompt keeps its length and form.

Shapes: n tokens of the answer, W words, R regions on a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pumice.conversation import Conversation, ImagePart, Message

# Nats per word that an answer must lose, on average over its words, when its pictures become grey and also
# when they are dropped, to be said to lean on them. docs/explaining.md says how the number was found.
THRESHOLD = 0.15


@dataclass(frozen=True)
class Reliance:
    """Log-probabilities of each word (W,), in nats, given the words before it: as it was answered, and again
    with every picture dropped and with every picture grey. share (W,): of attention that goes to the
    pictures' tokens, mean over layers and heads.
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
        """Nats per word that the whole answer loses, the smaller of both ways; 0 for an empty answer."""
        if not len(self.shown):
            return 0.0
        return float(min(self.loss_dropped.mean(), self.loss_grey.mean()))

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
        return (
            f"This answer does not lean on the picture: without it, it loses {told}, "
            f"less than {THRESHOLD:g}; the question's words alone would nearly do."
        )


def grey_picture(size: tuple[int, int], color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", size, color)


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
    return Conversation(
        tuple(
            Message(m.role, tuple(ImagePart(next(new)) if isinstance(p, ImagePart) else p for p in m.parts))
            for m in conversation.messages
        )
    )


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
