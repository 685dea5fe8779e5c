"""Pictures like photographs, and files of pictures."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colour with some noise: what resizing treats like a photograph."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    smooth = np.stack([np.sin(5 * x + 3 * y), np.cos(7 * y), np.sin(4 * x * y)], -1) * 100 + 128
    return Image.fromarray((smooth + random.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG written by hand: Pillow does not write every kind that it reads."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
