"""Take out of PNG files the texts and colour profiles that Pillow refuses as too long."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_long_texts(file: BinaryIO) -> BinaryIO:
    """Return the PNG in `file`, read from its beginning, without texts that are too long for Pillow.

    Pillow limits them against files that inflate to gigabytes. The file itself is returned where it has none;
    damage is left to the decoder.
    """
    # 1. Walk over the chunks (PNG specification, section 5.3): length, kind, data, checksum.
    keep_from, kept, total = 0, [], 0
    position = len(SIGNATURE)
    file.seek(position)
    while len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        end = position + 12 + size
        if kind in _TEXTS:
            length = _length(kind, file.read(size))
            total += length
            if length > PngImagePlugin.MAX_TEXT_CHUNK or total > PngImagePlugin.MAX_TEXT_MEMORY:
                total -= length
                kept.append((keep_from, position))
                keep_from = end
        position = end
        file.seek(position)
    file.seek(0)
    if not kept:
        return file
    # 2. Copy what lies between the long texts.
    data = file.read()
    return io.BytesIO(b"".join(data[start:end] for start, end in (*kept, (keep_from, len(data)))))


def _length(kind: bytes, data: bytes) -> int:
    """Return the length of a text or a profile; of a compressed one, at most one more than Pillow's limit."""
    _, _, rest = data.partition(b"\0")
    if kind == b"iTXt":
        compressed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        compressed, rest = kind != b"tEXt", rest if kind == b"tEXt" else rest[1:]
    if not compressed:
        return len(rest)
    try:
        return len(zlib.decompressobj().decompress(rest, PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return 0
