"""Show rows to people: pictures as coloured blocks in a terminal, or rows and pictures as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pumice.boxes import COLOURS, FORMS, Box, BoxMap, draw, fill, picture_boxes
from pumice.errors import InputError
from pumice.files import replacing
from pumice.geometry import Size
from pumice.images import open_image
from pumice.webpage import render, thumbnail

if TYPE_CHECKING:
    from rich.text import Text

    from pumice.conversation import StoredImage
    from pumice.data.rows import ImageFinder, Row

Labelled = tuple[str, Box]  # what is in a box, and the box in pixels of its picture

_COLUMNS = 40  # of a picture in the terminal
_SIDE = 320  # pixels of a picture on a page


def padded_map(size: Size) -> BoxMap:
    """Return how LLaVA-1.5 and its data write the boxes of a picture of this size."""
    return BoxMap(FORMS["padded"], size)


def blocks(image: Image.Image, boxes: Sequence[Labelled] = ()) -> Text:
    """Return an RGB image as text. A character is two pixels: its colour the upper, its ground the lower.

    boxes: in pixels of the image; below it stands what is in each.
    """
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    lines = max(1, round(_COLUMNS * image.height / image.width / 2))
    small = _with_boxes(image.resize((_COLUMNS, 2 * lines)), image.size, boxes, line=1, labels=False)
    pixels = np.asarray(small).tolist()
    text = Text()
    for upper_line, lower_line in zip(pixels[::2], pixels[1::2], strict=True):
        for upper, lower in zip(upper_line, lower_line, strict=True):
            colours = (Color.from_rgb(*pixel) for pixel in (upper, lower))
            text.append("▀", Style.from_color(*colours))
        text.append("\n")
    for number, (label, box) in enumerate(boxes):
        text.append("■ ", Style.from_color(Color.from_rgb(*COLOURS[number % len(COLOURS)])))
        text.append(f"{label or 'box'} [{', '.join(f'{n:.0f}' for n in box.corners)}]\n")
    return text


def row_boxes(
    row: Row, sizes: Sequence[Size], box_map: Callable[[Size], BoxMap] = padded_map
) -> list[list[Labelled]]:
    """Return, of each picture of a row, its boxes with their names.

    They are the row's `objects`, and what its texts hold, which is of the last picture. sizes: of its
    pictures. box_map: how texts hold boxes. Raises BoxError where a box is not in its picture.
    """
    found: list[list[Labelled]] = [[] for _ in sizes]
    if row.objects is not None:
        refs, boxes = row.objects.refs, picture_boxes(row.objects, sizes)
        names = refs if len(refs) == len(boxes) else refs * len(boxes) if len(refs) == 1 else ()
        for number, (image, box) in enumerate(zip(row.objects.images, boxes, strict=True)):
            found[image].append((names[number] if names else "", box))
    for _, text in row.turns if sizes else ():
        found[-1] += [(each.label, each.box) for each in box_map(sizes[-1]).find(text)]
    return [list(dict.fromkeys(boxes)) for boxes in found]  # a row may ask for the same box twice


def _with_boxes(
    small: Image.Image, size: Size, boxes: Sequence[Labelled], line: int | None = None, labels: bool = True
) -> Image.Image:
    """Draw boxes on a small copy of an image of this size."""
    across, down = small.width / size[0], small.height / size[1]
    scaled = [(label if labels else "", box.scaled(across, down)) for label, box in boxes]
    return draw(small, scaled, line) if boxes else small


def write_page(
    rows: Iterable[tuple[int, Row | InputError]],
    finder: ImageFinder,
    path: Path,
    title: str,
    box_map: Callable[[Size], BoxMap] = padded_map,
) -> None:
    """Write rows, each with its number from 1, and their pictures as one page that loads nothing else.

    box_map: how the rows' texts hold boxes, which are drawn on the pictures.
    """
    shown = []
    for number, row in rows:
        entry: dict[str, object] = {"number": number, "error": "", "turns": [], "pictures": []}
        shown.append(entry)
        if isinstance(row, InputError):
            entry["error"] = str(row)
            continue
        entry |= {"id": row.id, "turns": row.turns}
        opened = [_opened(row, image, finder) for image in row.image]
        images = [image for image in opened if not isinstance(image, InputError)]
        boxes: list[list[Labelled]] = [[] for _ in opened]
        if len(images) == len(opened):  # the sizes of all are known
            try:
                row.conversation(None)  # raises where its boxes and placeholders do not fit
                sizes = [image.size for image in images]
                boxes = row_boxes(row, sizes, box_map)
                if row.objects is not None:
                    texts = fill((text for _, text in row.turns), row.objects, [*map(box_map, sizes)])
                    entry["turns"] = [(who, text) for (who, _), text in zip(row.turns, texts, strict=True)]
            except InputError as error:
                entry["error"] = str(error)
        pictures = [
            ("", str(image)) if isinstance(image, InputError) else (_thumbnail(image, boxes[number]), "")
            for number, image in enumerate(opened)
        ]
        entry["pictures"] = pictures
    with replacing(path) as file:
        file.write(render(Path(__file__).with_name("preview.html"), title=title, rows=shown))


def _opened(row: Row, image: str | StoredImage, finder: ImageFinder) -> Image.Image | InputError:
    try:
        return open_image(row.find(image, finder))
    except InputError as error:
        return error


def _thumbnail(image: Image.Image, boxes: Sequence[Labelled]) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    return thumbnail(_with_boxes(small, image.size, boxes), _SIDE, quality=80)[0]
