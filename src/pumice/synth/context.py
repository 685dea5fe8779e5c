"""What a teacher is told about a picture: captions, and boxes as category and place.

Corners are normalised to 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pumice.errors import InputError

MOST_CAPTIONS, MOST_BOXES = 30, 40  # written into a prompt; the checks know them all
ROUNDING = 1e-2  # of a side: how far outside a box may reach before it is an error and not rounding


@dataclass(frozen=True)
class AnnotatedBox:
    """One annotated object: its category and (left, top, right, bottom) as shares of width and height."""

    category: str
    corners: tuple[float, float, float, float]

    @property
    def area(self) -> float:
        left, top, right, bottom = self.corners
        return (right - left) * (bottom - top)


@dataclass(frozen=True)
class Context:
    """All that is known about one picture. id is unique in a run; image is a path below a picture folder."""

    id: str
    image: str
    captions: tuple[str, ...] = ()
    boxes: tuple[AnnotatedBox, ...] = ()
    text: str = ""

    def described(self, *, boxes: bool) -> str:
        """As LLaVA's prompts have it (arXiv 2304.08485, section 3): captions, then `category: [corners]`.

        Corners have three decimals. Of many captions or boxes the first and the largest are written.
        """
        large = sorted(self.boxes, key=lambda box: -box.area)[:MOST_BOXES]
        places = [
            f"{box.category}: [{', '.join(f'{v:.3f}' for v in box.corners)}]"
            for box in self.boxes
            if boxes and box in large
        ]
        parts = ("\n".join(self.captions[:MOST_CAPTIONS]), "\n".join(places), self.text)
        return "\n\n".join(filter(None, parts))


class BadAnnotation(InputError):
    """One annotation that cannot be used, and that `max_spoiled` may leave out."""


class BadRows:
    """Counts what is wrong with annotations, and raises InputError when it is more than allowed."""

    def __init__(self, allowed: int = 0) -> None:
        self.allowed, self.count = allowed, 0
        self.first: list[str] = []  # sentences to show

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Count a BadAnnotation raised in this block; whatever the block does behind it is left out."""
        try:
            yield
        except BadAnnotation as error:
            self.count += 1
            self.first += [str(error)] if len(self.first) < 20 else []
            if self.count > self.allowed:
                allowed = f" ({self.count - 1} before it were allowed)" if self.allowed else ""
                sentence = f"{error}, or leave such annotations out with --set max_spoiled=N{allowed}"
                raise InputError(sentence) from error


def normalised(
    corners: Iterable[Any], width: float, height: float, where: str
) -> tuple[float, float, float, float]:
    """Return pixels (left, top, right, bottom) as shares of the sides, or raise BadAnnotation."""
    values = list(corners)
    if len(values) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise BadAnnotation(f"{where}: the box {values!r} is not four numbers; mend it")
    if not (width > 0 and height > 0):
        raise BadAnnotation(f"{where}: the picture is {width:g} x {height:g}; give its real size")
    written = f"{where}: the box [{', '.join(f'{v:g}' for v in values)}]"
    left, top, right, bottom = (v / s for v, s in zip(values, (width, height) * 2, strict=True))
    if left < -ROUNDING or top < -ROUNDING or right > 1 + ROUNDING or bottom > 1 + ROUNDING:
        raise BadAnnotation(f"{written} reaches out of the picture of {width:g} x {height:g}; mend it")
    left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in (left, top, right, bottom))
    if right <= left or bottom <= top:
        raise BadAnnotation(f"{written} has no area; mend it")
    return left, top, right, bottom
