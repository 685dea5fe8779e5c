"""Show rows to people: pictures as coloured blocks in a terminal, or rows and pictures as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pumice.data.images import open_pictures
from pumice.errors import InputError
from pumice.files import replacing
from pumice.webpage import render, thumbnail

if TYPE_CHECKING:
    from rich.text import Text

    from pumice.data.rows import ImageFinder, Row

_COLUMNS = 40  # of a picture in the terminal
_SIDE = 320  # pixels of a picture on a page


def blocks(image: Image.Image) -> Text:
    """Return an RGB image as text. A character is two pixels: its colour the upper, its ground the lower."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    lines = max(1, round(_COLUMNS * image.height / image.width / 2))
    pixels = np.asarray(image.resize((_COLUMNS, 2 * lines))).tolist()
    text = Text()
    for upper_line, lower_line in zip(pixels[::2], pixels[1::2], strict=True):
        for upper, lower in zip(upper_line, lower_line, strict=True):
            colours = (Color.from_rgb(*pixel) for pixel in (upper, lower))
            text.append("▀", Style.from_color(*colours))
        text.append("\n")
    return text


def write_page(
    rows: Iterable[tuple[int, Row | InputError]], finder: ImageFinder, path: Path, title: str
) -> None:
    """Write rows, each with its number from 1, and their pictures as one page that loads nothing else."""
    shown = []
    for number, row in rows:
        entry: dict[str, object] = {"number": number, "error": "", "turns": [], "pictures": []}
        shown.append(entry)
        if isinstance(row, InputError):
            entry["error"] = str(row)
            continue
        entry |= {"id": row.id, "turns": row.turns}
        pictures: list[tuple[str, str]] = []
        for image in row.image:
            try:
                opened = open_pictures(row.find(image, finder))
            except InputError as error:
                pictures.append(("", str(error)))
            else:
                pictures += [(thumbnail(picture, _SIDE, quality=80)[0], "") for picture in opened]
        entry["pictures"] = pictures
    with replacing(path) as file:
        file.write(render(Path(__file__).with_name("preview.html"), title=title, rows=shown))
