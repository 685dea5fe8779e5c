"""What every HTML page of ours begins with, and pictures inside pages. Pages load nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

# Nothing may be loaded from anywhere, even if a text of a model should try.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def head(title: str, style: str) -> str:
    """A page from its first line to the end of its head. title: text; style: CSS."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
    )


def jpeg_address(image: Image.Image, quality: int) -> str:
    """The picture as a data address, which an `img` shows. quality: JPEG's, 1 to 95."""
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()
