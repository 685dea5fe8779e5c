"""Boxes around things in a picture: how they are written for a model, read from its answers, and drawn.

A `Box` is in pixels of the upright picture. A `BoxMap` turns it into the numbers that a model reads and
writes, and back. What these numbers count depends on the model's form (`config.ModelConfig.boxes`):

    padded   shares of the square that the picture is padded to, as LLaVA-1.5 was trained (its issue 606)
    picture  shares of the picture's own sides
    qwen     thousandths of the picture's sides, as Qwen-VL writes them (arXiv 2308.12966, section 2.2)
    pixels   pixels of what the model is shown: its tile, or all tiles beside each other
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pumice.capability import IMAGE, Capability, fields
from pumice.config import ImagePolicy, ModelConfig
from pumice.conversation import BOX_PLACEHOLDER, REF_PLACEHOLDER, Conversation, Objects, Video
from pumice.errors import InputError, RowError
from pumice.geometry import Axis, Placement, Size, placement

if TYPE_CHECKING:
    from PIL import Image

ROUNDING = 0.01  # of a side: how far a box may reach out of its picture before it is an error
COLOURS = ((230, 60, 50), (20, 110, 220), (20, 150, 70), (240, 150, 0), (150, 70, 200), (0, 160, 170))
INK = (255, 255, 255)
LONGEST_LABEL = 60  # characters
# What decides where a box lies in what the model is shown, besides how its pixels are normalised.
CAPABILITY = Capability(
    "the map of a picture's boxes",
    {
        ImagePolicy: fields(IMAGE),
        ModelConfig: fields("boxes"),
    },
)

# Four numbers in brackets, or two points in brackets: [l, t, r, b], (l,t),(r,b).
_N = r"\s{0,4}(\d{1,6}(?:\.\d{1,9})?|\.\d{1,9})\s{0,4}"
_NUMBERS = re.compile(rf"[\[(]{_N},{_N},{_N},{_N}[\])]|\({_N},{_N}\)\s{{0,4}},?\s{{0,4}}\({_N},{_N}\)")
_TAG = re.compile(r"<[^<>\n]{1,40}>")  # <ref>, </ref>, <|box_start|>
_AROUND = re.compile(r"^(?:and|or)\s+|\s+(?:(?:is|are)\s+)?(?:at|in)$")  # "and the dog is at"
_JSON_LABEL = re.compile(r'"label"\s{0,4}:\s{0,4}"([^"\n]{1,60})"')
_JSON_AFTER = re.compile(rf"\s{{0,4}},\s{{0,4}}{_JSON_LABEL.pattern}")
_PLACEHOLDERS = re.compile(f"{REF_PLACEHOLDER}|{BOX_PLACEHOLDER}")


class BoxError(RowError):
    """What is wrong with the boxes of a row."""


@dataclass(frozen=True)
class Box:
    """A box in pixels of the upright picture, or in another unit where that is said."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        return self.left, self.top, self.right, self.bottom

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def meet(self, other: Box) -> Box:
        """Return what both boxes cover; its area is 0 where they do not meet."""
        return Box(
            max(self.left, other.left), max(self.top, other.top),
            min(self.right, other.right), min(self.bottom, other.bottom),
        )  # fmt: skip

    def mirrored(self, width: float) -> Box:
        """Return the box in the picture flipped left to right. width: of the picture, in the box's unit."""
        return Box(width - self.right, self.top, width - self.left, self.bottom)

    def iou(self, other: Box) -> float:
        """Return the area that both boxes cover as a share of the area that either covers, 0 to 1."""
        both = self.meet(other).area
        either = self.area + other.area - both
        return both / either if either > 0 else 0.0

    def scaled(self, across: float, down: float) -> Box:
        """Return the box in another unit, of which a present unit holds `across` and `down`."""
        return Box(self.left * across, self.top * down, self.right * across, self.bottom * down)


@dataclass(frozen=True)
class BoxForm:
    """How boxes are written. frame: what the numbers are measured on: padded, picture or canvas (all tiles).

    unit: what a whole side of the frame counts, 0 for its pixels. digits: after the point.
    """

    frame: str
    unit: int
    digits: int
    text: str


FORMS = {  # the names are those of media.BOX_FORMS
    "padded": BoxForm("padded", 1, 2, "[{}, {}, {}, {}]"),
    "picture": BoxForm("picture", 1, 2, "[{}, {}, {}, {}]"),
    "qwen": BoxForm("picture", 1000, 0, "({},{}),({},{})"),
    "pixels": BoxForm("canvas", 0, 0, "[{}, {}, {}, {}]"),
}


@dataclass(frozen=True)
class FoundBox:
    """A box in a text. box: in pixels of the picture. start, end: where its numbers stand in the text.

    label: what the text calls it; "" if it does not say.
    """

    box: Box
    label: str
    start: int
    end: int


@dataclass(frozen=True)
class BoxMap:
    """Turns boxes of one picture into the numbers that a model reads and writes, and back.

    size: of the picture. placed: where it lies on what the model is shown; None if that is not known, which
    the form pixels does not allow. mirror: it is shown flipped left to right. tiled: it is flipped before it
    is placed, as pictures in tiles are, and not after.
    """

    form: BoxForm
    size: Size
    placed: Placement | None = None
    mirror: bool = False
    tiled: bool = False

    def numbers(self, box: Box) -> tuple[float, float, float, float]:
        """Return a box as numbers of the form, not rounded. `box` is the inverse."""
        if self.mirror and self.tiled:
            box = box.mirrored(self.size[0])
        across, down = self._axes
        left, right = across.inverse(box.left), across.inverse(box.right)
        written = Box(left, down.inverse(box.top), right, down.inverse(box.bottom))
        return (written.mirrored(self._sides[0]) if self.mirror and not self.tiled else written).corners

    def box(self, numbers: Sequence[float]) -> Box:
        """Return the box of numbers of the form: left, top, right, bottom."""
        written = Box(*numbers)
        if self.mirror and not self.tiled:
            written = written.mirrored(self._sides[0])
        across, down = self._axes
        box = Box(across(written.left), down(written.top), across(written.right), down(written.bottom))
        return box.mirrored(self.size[0]) if self.mirror and self.tiled else box

    @property
    def _sides(self) -> tuple[int, int]:
        """The numbers of the frame's right and lower edge."""
        return (self.form.unit, self.form.unit) if self.form.unit else self._canvas.canvas

    @property
    def _axes(self) -> tuple[Axis, Axis]:
        """Convert numbers of the form to pixels of the picture."""
        if self.form.frame == "canvas":
            return self._canvas.across, self._canvas.down
        side = max(self.size)
        across, down = (
            Axis(side / self.form.unit, -((side - n) // 2)) if self.form.frame == "padded"
            else Axis(n / self.form.unit, 0)
            for n in self.size
        )  # fmt: skip
        return across, down

    @property
    def _canvas(self) -> Placement:
        if self.placed is None:
            raise InputError("boxes in pixels are those of what a model is shown; name the model")
        return self.placed

    def shown(self) -> Box:
        """Return the part of the picture that the model is shown: all of it, or the middle under crop."""
        whole = Box(0, 0, *self.size)
        if self.placed is None:
            return whole
        across, down, (width, height) = self.placed.across, self.placed.down, self.placed.canvas
        return whole.meet(Box(across(0), down(0), across(width), down(height)))

    def write(self, box: Box) -> str:
        """Return the text of a box, of which only what is shown is written.

        Raises BoxError where nothing of it is shown.
        """
        part = box.meet(self.shown())
        if part.area <= 0:
            raise BoxError(
                "box not shown",
                f"the box {_listed(box.corners)} lies outside of what the model is shown of the picture, "
                f"{_listed(self.shown().corners)}; remove it",
            )
        digits = self.form.digits
        return self.form.text.format(*(f"{max(n, 0):.{digits}f}" for n in self.numbers(part)))

    def find(self, text: str) -> list[FoundBox]:
        """Return the boxes in a text, in order. Numbers that do not fit the form are none."""
        found, end = [], 0
        for match in _NUMBERS.finditer(text):
            written = [number for number in match.groups() if number is not None]
            if self._fits(written):
                label = _label(text, end, match.start(), match.end())
                found.append(FoundBox(self.box([float(n) for n in written]), label, *match.span()))
            end = match.end()
        return found

    def _fits(self, written: Sequence[str]) -> bool:
        left, top, right, bottom = numbers = [float(n) for n in written]
        if self.form.unit != 1 and max(numbers) <= 1 and any("." in n for n in written):
            return False  # shares, where larger units are written
        inside = all(n <= most for n, most in zip(numbers, self._sides * 2, strict=True))
        return inside and left <= right and top <= bottom


def box_map(config: ModelConfig, size: Size, images: int = 1, *, mirror: bool = False) -> BoxMap:
    """Return the map of a picture's boxes for a model.

    size: (width, height) of the upright picture. images: how many its conversation has. mirror: it is shown
    flipped left to right, as in training.
    """
    CAPABILITY.check(config.image)
    tiled = config.image.uses_tiles(images)
    return BoxMap(FORMS[config.boxes], size, placement(config, size, images), mirror, tiled)


def check_objects(conversation: Conversation) -> None:
    """Raise BoxError where the texts ask for more boxes or names than there are, or a box cannot be one.

    Names and boxes beside a video are refused, too. Pictures are not opened: `picture_boxes` finds boxes
    outside of them.
    """
    objects = conversation.objects or Objects()
    text = "".join(message.text for message in conversation.messages)
    for placeholder, values, noun in (
        (BOX_PLACEHOLDER, objects.boxes, "boxes"), (REF_PLACEHOLDER, objects.refs, "refs"),
    ):  # fmt: skip
        if (count := text.count(placeholder)) > len(values):
            raise BoxError(
                "box placeholders",
                f"{count} {placeholder} for {len(values)} {noun}; write one placeholder per box or ref",
            )
    if conversation.objects and any(isinstance(image.source, Video) for image in conversation.images):
        raise BoxError("objects beside a video", "'objects' are those of pictures; remove them or the video")
    check_boxes(objects, len(conversation.images))


def check_boxes(objects: Objects, pictures: int) -> None:
    """Raise BoxError for a box that cannot be one. pictures: how many the row has."""
    for corners, number in zip(objects.boxes, objects.images, strict=True):
        left, top, right, bottom = corners
        written = f"the box {_listed(corners)}"
        if not all(map(math.isfinite, corners)):
            raise BoxError("box without numbers", f"{written} is not four finite numbers; correct it")
        if right < left or bottom < top:
            raise BoxError(
                "swapped corners", f"{written} ends before it begins; write left, top, right, bottom"
            )
        if right == left or bottom == top:
            raise BoxError("empty box", f"{written} has no area; correct or remove it")
        if not 0 <= number < pictures:
            raise BoxError(
                "box without a picture",
                f"{written} is of picture {number}, the row has {pictures}, counted from 0",
            )


def assumed_unit(objects: Objects) -> str:
    """Return the unit of boxes that state none: norm1 if none exceeds 1, but for rounding, else real."""
    shares = all(abs(n) <= 1 + ROUNDING for corners in objects.boxes for n in corners)
    return "norm1" if shares else "real"


def picture_boxes(objects: Objects, sizes: Sequence[Size]) -> list[Box]:
    """Return the boxes in pixels of their pictures. sizes: of all pictures of the row.

    A box that reaches out by rounding is cut off at the picture's edge. Raises BoxError for any other.
    """
    unit = objects.unit or assumed_unit(objects)
    boxes = []
    for corners, number in zip(objects.boxes, objects.images, strict=True):
        width, height = sizes[number]
        whole = Box(0, 0, width, height)
        per_unit = {"real": (1.0, 1.0), "norm1": (width, height), "norm1000": (width / 1000, height / 1000)}
        box = Box(*corners).scaled(*per_unit[unit])
        inside = box.meet(whole)
        tolerance = ROUNDING * max(width, height)
        outside = any(abs(a - b) > tolerance for a, b in zip(box.corners, inside.corners, strict=True))
        if outside or inside.area <= 0:
            assumed = "" if objects.unit else f", read as {unit} because the row has no bbox_type,"
            raise BoxError(
                "box outside the picture",
                f"the box {_listed(corners)}{assumed} reaches out of its picture of {width} x {height}; "
                "correct it, or write bbox_type: real, norm1 or norm1000",
            )
        boxes.append(inside)
    return boxes


def holds_boxes(conversation: Conversation) -> bool:
    """Return whether a text of the conversation holds four numbers that are written as a box."""
    return any(_NUMBERS.search(message.text) for message in conversation.messages)


def fill(texts: Iterable[str], objects: Objects, maps: Sequence[BoxMap]) -> list[str]:
    """Return texts with names and boxes in the places of their placeholders. maps: of the row's pictures.

    Raises BoxError where a box is outside its picture or of what is shown of it.
    """
    boxes = picture_boxes(objects, [each.size for each in maps])
    refs = iter(objects.refs)
    written = (maps[number].write(box) for box, number in zip(boxes, objects.images, strict=True))
    return [
        _PLACEHOLDERS.sub(lambda match: next(refs if match[0] == REF_PLACEHOLDER else written), text)
        for text in texts
    ]


def write_boxes(conversation: Conversation, maps: Sequence[BoxMap]) -> Conversation:
    """Return the conversation with its names and boxes in its texts, as in `fill`."""
    texts = [part for message in conversation.messages for part in message.parts if isinstance(part, str)]
    filled = iter(fill(texts, conversation.objects or Objects(), maps))
    messages = tuple(
        replace(
            message, parts=tuple(next(filled) if isinstance(part, str) else part for part in message.parts)
        )
        for message in conversation.messages
    )
    return replace(conversation, messages=messages, objects=None)


def draw(image: Image.Image, boxes: Iterable[tuple[str, Box]], line: int | None = None) -> Image.Image:
    """Return a copy of an RGB image with boxes, each in a colour of its own, and their labels.

    boxes: (label, box in the image's pixels); what lies outside of the image is cut off. line: pixels; by the
    image's size if None.
    """
    from PIL import ImageDraw, ImageFont

    drawn = image.convert("RGB")  # a copy, also of RGB
    pen, line = ImageDraw.Draw(drawn), line or max(2, round(max(image.size) / 200))
    font = ImageFont.load_default(max(11, round(max(image.size) / 40)))
    for number, (label, box) in enumerate(boxes):
        colour = COLOURS[number % len(COLOURS)]
        left, top, right, bottom = map(round, box.meet(Box(0, 0, *image.size)).corners)
        if right < left or bottom < top:
            continue
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        if label:
            text = label[:LONGEST_LABEL]
            wide, high = (math.ceil(n) + 2 for n in font.getbbox(text)[2:])
            # Above the box if there is room, and never beyond the picture's right edge.
            x, y = max(0, min(left, image.width - wide)), top - high if top >= high else top
            pen.rectangle((x, y, x + wide, y + high), fill=colour)
            pen.text((x + 1, y), text, fill=INK, font=font)
    return drawn


def _label(text: str, begin: int, start: int, end: int) -> str:
    """Return what a text calls the box at start..end: JSON's "label", or the words before it in its line."""
    if after := _JSON_AFTER.match(text, end):
        return after[1]
    before = text[max(begin, start - 4 * LONGEST_LABEL) : start]
    if labels := _JSON_LABEL.findall(before):
        return str(labels[-1])
    words = _AROUND.sub("", _TAG.sub("", before.rpartition("\n")[2]).strip(" \t:;,.-=*>(["))
    return "" if any(letter in words for letter in '{}[]"') else words[-LONGEST_LABEL:]


def _listed(corners: Iterable[float]) -> str:
    return f"[{', '.join(f'{number:g}' for number in corners)}]"
