"""The head of every HTML page that Pumice writes, and pictures inside pages."""

from __future__ import annotations

import base64
import io
from html import escape

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


def jpeg_address(image: Image.Image, quality: int) -> str:
    """Return the image as a data URL for an `img` element. quality: JPEG's, 1 to 95."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
