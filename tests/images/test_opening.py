"""Pictures of every kind are opened alike, and bad ones are refused."""

from __future__ import annotations

import io
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, photograph, png
from PIL import Image, features

from pumice.cli.chat import _read_file
from pumice.data.images import decode_image
from pumice.errors import InputError
from pumice.images import MAX_PIXELS, data_url, image_key, image_size, is_video, open_image, read_image


def array(source: object) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF", "JPEG2000"])
def test_formats_open_from_path_and_bytes(tmp_path: Path, kind: str) -> None:
    image = photograph(40, 30)
    data = encoded(image, kind)
    path = tmp_path / "no suffix at all"
    path.write_bytes(data)
    tolerance = 15 if kind in ("JPEG", "WEBP", "GIF") else 0
    for source in (data, path, str(path)):
        assert np.abs(array(source).astype(int) - np.asarray(image)).mean() <= tolerance


def test_pil_image_is_left_as_it_was() -> None:
    image = Image.new("LA", (3, 2), (0, 0))
    assert (array(image) == 255).all()
    assert image.mode == "LA" and image.getpixel((0, 0)) == (0, 0)
    rgb = photograph(4, 4)
    assert open_image(rgb) is not rgb


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), "blue")
    upright.paste((255, 0, 0), (0, 0, 32, 16))  # red top left, green bottom left
    upright.paste((0, 255, 0), (0, 16, 32, 32))
    # How a camera held in each position stores the upright scene (the inverse of the EXIF table).
    stored = {
        1: lambda i: i,
        2: lambda i: i[:, ::-1],
        3: lambda i: i[::-1, ::-1],
        4: lambda i: i[::-1],
        5: lambda i: i.transpose(1, 0, 2),
        6: lambda i: np.rot90(i, 1),
        7: lambda i: np.rot90(i, 2).transpose(1, 0, 2),
        8: lambda i: np.rot90(i, -1),
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    result = array(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert result.shape == (32, 64, 3)
    assert np.abs(result[4, 4].astype(int) - (255, 0, 0)).max() < 10
    assert np.abs(result[28, 4].astype(int) - (0, 255, 0)).max() < 10
    assert np.abs(result[16, 60].astype(int) - (0, 0, 255)).max() < 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_sizes_are_those_of_the_upright_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(40, 30), kind, exif=exif)
    assert image_size(data) == open_image(data).size == ((40, 30) if orientation < 5 else (30, 40))
    opened = Image.open(io.BytesIO(data))
    assert image_size(opened) == open_image(opened).size


def test_sizes_of_what_is_no_picture_are_refused(tmp_path: Path) -> None:
    for source in (tmp_path / "missing.png", b"", b"nothing", Image.new("RGB", (0, 5))):
        with pytest.raises(InputError):
            image_size(source)


def test_damaged_exif_is_ignored() -> None:
    assert array(encoded(photograph(8, 6), "PNG", exif=b"Exif\x00\x00garbage")).shape == (6, 8, 3)


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (20, 10), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3, kind
        assert (array(data) == (255, 0, 0)).all(), kind


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 32768, 65280, 65535]], np.uint16)
    expected = np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert np.abs(array(encoded(Image.fromarray(values), kind)).astype(int) - expected).max() == 0, kind
    big_endian = struct.pack(">18H", *np.repeat(values, 3))
    result = array(png(6, 1, 16, 2, b"\0" + big_endian))
    assert np.abs(result.astype(int) - expected).max() <= 1  # Pillow itself keeps the high byte of colour
    dark = Image.fromarray(np.array([[0, 2570]], np.uint16))
    assert (array(dark)[0, :, 0] == (0, 10)).all(), "a dark picture stays dark"
    result = array(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    assert (result == expected).all()


def test_integer_and_float_images_keep_their_shades() -> None:
    assert (array(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)))[0, :, 0] == (0, 128, 255)).all()
    assert (
        array(Image.fromarray(np.array([[0.0, 100.0, 200.0]], np.float32)))[0, :, 0] == (0, 128, 255)
    ).all()
    assert (array(Image.fromarray(np.array([[-5, 2**16, 2**17]], np.int32)))[0, :, 0] == (0, 128, 255)).all()


def test_colour_modes() -> None:
    assert (array(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")) > (250, -1, -1)).all()
    assert (array(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)).all()
    assert (array(encoded(Image.new("1", (3, 3), 1), "PNG")) == 255).all()
    assert (array(encoded(Image.new("L", (3, 3), 77), "PNG")) == 77).all()
    grey_lab = array(Image.new("LAB", (2, 2), (128, 128, 128))).astype(int)
    assert np.ptp(grey_lab, axis=-1).max() <= 3


def test_transparency_is_white() -> None:
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (200, 0, 0, 128))
    assert array(encoded(half, "PNG")).tolist() == [[[255, 255, 255], [227, 127, 127]]]
    assert array(encoded(Image.new("LA", (1, 1), (0, 0)), "PNG")).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert array(encoded(palette, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    for kind in ("PNG", "GIF"):
        assert array(encoded(palette, kind, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    key_colour = encoded(photograph(1, 1).point(lambda _: 9), "PNG", transparency=(9, 9, 9))
    assert array(key_colour).tolist() == [[[255, 255, 255]]]


def _message(source: object) -> str:
    with pytest.raises(InputError) as caught:
        open_image(source)
    message = str(caught.value)
    assert "\n" not in message and ";" in message, "one sentence with a remedy"
    return message


def test_bad_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "text.jpg").write_text("a" * 5000)
    for name, reason in {
        "missing.jpg": "does not exist",
        "nul\0.jpg": "does not exist",
        "n" * 300: "cannot be opened",
        "": "is a folder",
        "zero.jpg": "is empty (0 bytes)",
        "text.jpg": "is not a picture",
        "text.jpg/inside": "does not exist",
    }.items():
        message = _message(tmp_path / name)
        assert reason in message
        assert repr(str(tmp_path / name)) in message


def test_bad_bytes_and_types() -> None:
    assert "is empty" in _message(b"")
    assert "the picture's path is empty" in _message("")
    assert "picture of 300 bytes is not a picture" in _message(b"\x00\x01\x02" * 100)
    assert "the list is not a picture; give a path" in _message([1, 2])
    assert "has no pixels (0 x 5)" in _message(Image.new("RGB", (0, 5)))
    assert "not a picture that can be read" in _message(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3", b"RIFF\0\1\0\0AVI LIST", b"\x00\x00\x01\xba"]
)
def test_a_video_is_told_where_it_goes(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "clip.jpg"
    path.write_bytes(head + b"\0" * 100)
    for source in (path, path.read_bytes()):
        assert is_video(source)
        assert "is a video; show it as 'video' in a row, 'video_url' in a request" in _message(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    data = encoded(photograph(120, 90), kind)
    path = tmp_path / "cut.bin"
    path.write_bytes(data[: int(len(data) * share)])
    message = _message(path)
    assert "truncated or damaged" in message or "not a picture" in message
    assert "cut.bin" in message


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"]), st.data())
def test_damaged_files_open_or_are_refused(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(photograph(24, 18), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(content)).mode == "RGB"
    except InputError as error:
        assert "\n" not in str(error)


def test_decompression_bombs_are_refused_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(50_000, 50_000, 8, 2, b""))
    assert "bomb.png' is refused as enormous; give a copy of at most 100 megapixels" in _message(path)
    side = int(MAX_PIXELS**0.5) + 1  # beyond our limit, where Pillow by itself only warns
    with pytest.warns(Image.DecompressionBombWarning):
        assert f"is {side} x {side}, more than 100 megapixels" in _message(png(side, side, 8, 0, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "is refused as enormous" in _message(png(side, side, 8, 0, b""))


def test_limit_holds_when_pillow_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "is 50000 x 50000, more than 100 megapixels" in _message(png(50_000, 50_000, 8, 2, b""))
    monkeypatch.setattr("pumice.images.MAX_PIXELS", 11)
    assert "is 4 x 3, more than 1.1e-05 megapixels" in _message(photograph(4, 3))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_without_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert open_image(encoded(photograph(40, 30), "AVIF")).size == (40, 30)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_pictures_of_telephones(kind: str) -> None:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    heif.register_heif_opener()
    data = encoded(photograph(40, 30), kind)
    assert open_image(data).size == (40, 30)


@pytest.mark.parametrize(("brand", "kind"), [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF")])
def test_pictures_of_telephones_without_a_decoder(
    monkeypatch: pytest.MonkeyPatch, brand: bytes, kind: str
) -> None:
    monkeypatch.setattr("pumice.images._heif_formats", lambda kind: ())
    assert not is_video(b"\0\0\0\x18ftyp" + brand)  # as films in MP4 begin
    with pytest.raises(InputError, match=rf"is in {kind}, which needs the package pillow-heif: pip install"):
        open_image(b"\0\0\0\x18ftyp" + brand + b"\0" * 100)


def test_image_key_follows_contents(tmp_path: Path) -> None:
    image, other = photograph(9, 7), photograph(9, 7, seed=1)
    data = encoded(image, "PNG")
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(data)
    second.write_bytes(data)
    assert image_key(first) == image_key(str(second)) == image_key(data)
    assert image_key(data) != image_key(encoded(other, "PNG"))
    assert image_key(image) == image_key(image.copy()) != image_key(other)
    assert image_key(Image.new("RGB", (2, 8))) != image_key(Image.new("RGB", (8, 2)))
    assert len(image_key(data)) == 32
    with pytest.raises(InputError, match="does not exist"):
        image_key(tmp_path / "missing.png")


def test_a_file_is_read_once(tmp_path: Path, replaced_when_opened: Any) -> None:
    opened_images = []
    for color, kind in (("red", "PPM"), ("blue", "BMP")):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), color).save(buffer, kind)
        opened_images.append(buffer.getvalue())
    file = tmp_path / "latest.ppm"
    urls = [data_url(data) for data in opened_images]
    replaced_when_opened(file, opened_images)
    assert [data_url(file), data_url(file)] == urls
    assert [decode_image(file).kind, decode_image(file).kind] == ["", "BMP"]
    for expected in opened_images:
        assert _read_file(str(file), None) == (str(file), expected)
    file.write_bytes(opened_images[0][:20])
    with pytest.raises(InputError, match=r"picture '.*latest\.ppm' is truncated or damaged"):
        open_image(read_image(file))
