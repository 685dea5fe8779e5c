"""The head of every HTML page that Pumice writes, and pictures inside pages."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

# A page loads nothing from elsewhere, not even if a model's answer contains HTML that tries to.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def head(title: str, style: str) -> str:
    """Return a page from its first line to the end of its head. title: text; style: CSS."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
    )


def render(template: Path, **values: Any) -> str:
    """Fill a template of Jinja. All values are escaped; the template's `head` is the function above."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["head"] = lambda title, style: Markup(head(title, style))
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def thumbnail(image: Image.Image, side: int, quality: int) -> tuple[str, tuple[int, int]]:
    """Return the image as a data URL of JPEG, at most `side` pixels wide and high, and its size.

    quality: JPEG's, 1 to 95.
    """
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), small.size
