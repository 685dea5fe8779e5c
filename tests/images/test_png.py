"""Long texts in a PNG are passed over."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import pytest
from pictures import chunk, png

from pumice.errors import InputError
from pumice.images import image_size, open_image
from pumice.png import without_long_texts

TEXT = "The words of a workflow. " * 60_000  # 1.5 MB, more than Pillow reads of one text


def with_chunks(kind: bytes, *bodies: bytes, late: bool = False) -> bytes:
    """A PNG of one red pixel with chunks before its pixels, or behind them."""
    whole = png(1, 1, 8, 2, b"\0\xff\0\0")
    at = whole.index(b"IEND" if late else b"IDAT") - 4
    return whole[:at] + b"".join(chunk(kind, body) for body in bodies) + whole[at:]


LONG = zlib.compress(TEXT.encode())
SHORT = zlib.compress(b"short")


@pytest.mark.parametrize(
    ("kind", "bodies"),
    [
        (b"zTXt", [b"workflow\0\0" + LONG]),
        (b"iTXt", [b"XML:com.adobe.xmp\0\1\0\0\0" + LONG]),
        (b"iTXt", [b"XML:com.adobe.xmp\0\0\0\0\0" + TEXT.encode()]),
        (b"iCCP", [b"profile\0\0" + LONG]),
        (b"zTXt", [b"first\0\0" + SHORT, b"second\0\0" + LONG, b"third\0\0" + SHORT]),
        (b"tEXt", [b"many\0" + TEXT.encode()] * 50),  # 75 MB together
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_long_texts_in_a_png(tmp_path: Path, kind: bytes, bodies: list[bytes], late: bool) -> None:
    data = with_chunks(kind, *bodies, late=late)
    path = tmp_path / "long.png"
    path.write_bytes(data)
    for source in (data, path):
        assert open_image(source).getpixel((0, 0)) == (255, 0, 0)
        assert image_size(source) == (1, 1)


def test_short_texts_of_a_png_are_kept() -> None:
    """A picture is turned by the EXIF that stands in such a text; a file without long ones is not copied."""
    orientation = (
        b"exif\nexif\n      26\n" + (b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0").hex().encode()
    )
    file = io.BytesIO(with_chunks(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(orientation)))
    assert without_long_texts(file) is file
    assert file.tell() == 0


def test_a_damaged_png_with_a_long_text_is_still_damaged() -> None:
    data = with_chunks(b"zTXt", b"workflow\0\0" + LONG)
    with pytest.raises(InputError, match="truncated or damaged"):
        open_image(data[: data.index(b"IDAT") + 6])
