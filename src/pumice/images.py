"""Open image files safely and turn them into the tower's input. No other module opens an image.

Shapes: P tiles of one image, S pixels on a side.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from PIL import Image, UnidentifiedImageError

from pumice.config import TILED, ImagePolicy
from pumice.conversation import ImagePart, StoredImage
from pumice.errors import CAUSE, InputError, install, wrong_input
from pumice.geometry import (
    LONGEST_CROPPED,
    best_resolution,
    grid_size,
    letterbox,
    shortened,
    split_sizes,
)
from pumice.png import SIGNATURE, without_long_texts


class EnormousImage(InputError):
    """An image whose header says that it has more than MAX_PIXELS."""


class ImageBytes(bytes):
    """The contents of an image file that was read once. name: of the file, for messages."""

    name: str


Source = str | PathLike[str] | bytes | StoredImage | Image.Image

MAX_PIXELS = 100_000_000  # of one image, by its header; a larger one is refused before it is decoded

# Only formats that decode inside Pillow: EPS, for one, would start Ghostscript on a stranger's file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

# Formats of telephones and of the web. Pillow opens AVIF since 11.3, and both with the package pillow-heif.
_HEIF_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)

# What stands at these bytes of a file: the containers of videos.
_VIDEOS = {0: (b"\x1aE\xdf\xa3", b"FLV\x01", b"\x00\x00\x01\xba", b"OggS"), 4: (b"ftyp", b"moov")}

# The first bytes of files in formats that every reader of data URLs accepts.
_COMMON = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp"}

_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF 2.32, table 6: how to turn the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_UPRIGHT[number] for number in (5, 6, 7, 8)}


@overload
def read_image(source: str | PathLike[str] | bytes | StoredImage) -> bytes: ...
@overload
def read_image(source: Image.Image) -> Image.Image: ...
def read_image(source: Source) -> bytes | Image.Image:
    """Return a picture that can no longer change: for a path, the bytes of its file, read once.

    Hashing, measuring and opening then use the same picture, even if the file is replaced meanwhile.
    Raises InputError when the file is missing, empty or cannot be read.
    """
    if isinstance(source, Image.Image):
        return source
    name = _name(source)
    with (
        wrong_input(OSError, f"{name} cannot be read: {CAUSE}; check the disk"),
        _open_file(source, name) as file,
    ):
        data = file.read()
    if isinstance(source, bytes):
        return source
    picture = ImageBytes(data)
    picture.name = ImagePart(source).name
    return picture


def open_image(source: Source) -> Image.Image:
    """Return a path, the bytes of a file, or a PIL image as an upright 8-bit RGB image.

    An animation gives its first frame. Transparent parts become white. 16 bits are scaled to 8. A PIL image
    is not changed. Raises InputError if the source is missing, not an image, damaged, or larger than
    MAX_PIXELS.
    """
    with _opened(source) as image:
        rgb = _decode(image, _name(source))
        return rgb.copy() if rgb is source else rgb


def image_size(source: Source) -> tuple[int, int]:
    """Return the (width, height) that `open_image` would give, from the file's header if that is enough.

    Raises InputError as `open_image` does, but may not notice damage behind the header.
    """
    if isinstance(source, StoredImage) and source.size is not None:
        return source.size
    with _opened(source) as image:
        if image.format == "TIFF":  # Pillow turns these by itself, one version before, another after decoding
            return _decode(image, _name(source)).size
        width, height = image.size
        return (height, width) if _turn(image) in _SIDEWAYS else (width, height)


def is_animated(source: Source) -> bool:
    """Return whether a picture's file holds several frames. Raises InputError as `image_size` does."""
    with _opened(source) as image:
        try:
            return bool(getattr(image, "is_animated", False))
        except Exception as error:  # Pillow looks for a second frame, and decoders raise anything
            raise _damaged(_name(source), error) from error


def is_video(source: Any) -> bool:
    """Return whether a file, or its bytes, is a video by its contents; an animation is a picture as well."""
    head = source[:12] if isinstance(source, bytes) else b""
    if isinstance(source, str | Path) and os.path.isfile(source):  # False for an overlong path
        with contextlib.suppress(OSError), open(source, "rb") as file:  # the reader says why
            head = file.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return True
    if _heif_kind(head):
        return False
    return any(head[start:].startswith(marks) for start, marks in _VIDEOS.items())


def pixels(image: Image.Image, size: int, policy: ImagePolicy) -> np.ndarray:
    """Return an RGB image from `open_image` as one tile for the tower, float32 (3, S, S), S = size.

    "pad" pads to a square and resizes, as LLaVA's expand2square; so does "anyres" for an image without tiles.
    "crop" resizes the shorter side and crops the centre, bit for bit as CLIPImageProcessor before
    normalisation. "squash" ignores the aspect ratio.
    """
    resample = _RESAMPLE[policy.resample]
    if policy.mode in ("pad", "anyres"):
        tile = _pad(image, policy.pad_color).resize((size, size), resample)
    elif policy.mode == "crop":
        tile = _crop(image, size, resample)
    else:
        assert policy.mode in ("squash", "split", "grid"), policy.mode
        if policy.longest_edge and policy.mode != "grid":
            image = image.resize(split_sizes(image.size, policy.longest_edge, size)[0], resample)
        tile = image.resize((size, size), resample)
    return _normalise(tile, policy)


def to_tiles(
    image: Image.Image, size: int, policy: ImagePolicy, *, tiles: bool = True, mirror: bool = False
) -> np.ndarray:
    """Return all tiles of an RGB image for the tower, float32 (P, 3, S, S), S = size.

    Under "anyres" (LLaVA-NeXT) the first tile is the whole image, squashed. The others are cut, row by row,
    from the image at its best resolution, letterboxed in black; P = `geometry.tile_layout(...).tiles`. If
    `tiles` is False, and in a mode without tiles, P = 1. mirror: flip left to right.
    """
    if policy.mode not in TILED or not tiles:
        tile = pixels(image, size, policy)
        return np.ascontiguousarray(tile[:, :, ::-1] if mirror else tile)[None]
    # 1. Mirror before cutting: the tiles of a mirrored image are in another order.
    resample = _RESAMPLE[policy.resample]
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if policy.mode == "grid":
        return _grid(image, size, policy)
    # 2. Idefics3's tiles are of the image resized twice. The whole image follows them.
    if policy.mode == "split":
        for target in split_sizes(image.size, policy.longest_edge, size):
            image = image.resize(target, resample)
        crops = [*_cut(image, size), image.resize((size, size), resample)]
    # 3. LLaVA-NeXT's are of the image in the resolution that keeps most of its pixels, and of its aspect
    # ratio. The squashed image stands before them.
    else:
        width, height = best_resolution(image.size, policy.pinpoints)
        fitted = image.resize(letterbox(image.size, (width, height)), resample)
        boxed = Image.new("RGB", (width, height))
        boxed.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        crops = [image.resize((size, size), resample), *_cut(boxed, size)]
    return np.stack([_normalise(tile, policy) for tile in crops])


def _grid(image: Image.Image, size: int, policy: ImagePolicy) -> np.ndarray:
    """Return nanoVLM's tiles: the whole image, then its tiles, row by row.

    The whole image is resized from floats, as torchvision does with a tensor.
    """
    target = grid_size(image.size, policy.longest_edge, size, policy.enlarge)
    values = _normalise(resized := image.resize(target, _RESAMPLE[policy.resample]), policy)
    whole = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR)) for plane in values
    ]
    return np.stack([np.stack(whole), *(_normalise(tile, policy) for tile in _cut(resized, size))])


def _cut(image: Image.Image, size: int) -> list[Image.Image]:
    """Cut an image of whole tiles into them, row by row."""
    return [
        image.crop((left, top, left + size, top + size))
        for top in range(0, image.height, size)
        for left in range(0, image.width, size)
    ]


def image_key(source: Source) -> str:
    """Return a hash of the picture's contents, the same in every process: 32 hexadecimal digits.

    A file and its bytes have the same key. Raises InputError if the source cannot be read.
    """
    if isinstance(source, Image.Image):
        image = open_image(source)
        contents = f"{image.size}".encode() + image.tobytes()
    else:
        contents = read_image(source)
    return hashlib.blake2b(contents, digest_size=16).hexdigest()


def data_url(source: str | PathLike[str] | bytes) -> str:
    """Return a picture's file as a data URL (RFC 2397), as JPEG where it is of a format that browsers lack.

    Raises InputError when it cannot be read; only a file of a rarer format is decoded and so checked.
    """
    data = read_image(source)
    kind = next((name for mark, name in _COMMON.items() if data.startswith(mark)), None)
    if kind is None:
        buffer, kind = io.BytesIO(), "jpeg"
        open_image(data).save(buffer, "JPEG", quality=90)
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """Open an image: its header is read and its size checked, its pixels are not decoded yet."""
    name = _name(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, name)
        yield source
        return
    with _open_file(source, name) as opened:
        head = opened.read(12)
        opened.seek(0)
        file = without_long_texts(opened) if head.startswith(SIGNATURE) else opened
        kind = _heif_kind(head)
        try:
            image = Image.open(file, formats=(*FORMATS, *(_heif_formats(kind) if kind else ())))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise EnormousImage(
                f"{name} is refused as enormous; give a copy of at most {MAX_PIXELS / 1e6:g} megapixels"
            ) from error
        except UnidentifiedImageError as error:
            if kind is not None:
                raise InputError(
                    f"{name} is in {kind}, which needs the package pillow-heif: {install('heif')}; "
                    "or save it as JPEG"
                ) from error
            if is_video(head):
                raise InputError(
                    f"{name} is a video; show it as 'video' in a row, 'video_url' in a request, /video in a "
                    "chat, Video(path) in Python"
                ) from error
            raise InputError(
                f"{name} is not a picture that can be read; use one of {', '.join(FORMATS)}"
            ) from error
        except Exception as error:  # decoders raise anything, struct.error to MemoryError, on a bad header
            raise _damaged(name, error) from error
        with image:
            _check_size(image.size, name)
            yield image


def _heif_kind(head: bytes) -> str | None:
    """Return "HEIC" or "AVIF" for the first 12 bytes of such a picture, else None."""
    return _HEIF_BRANDS.get(head[8:]) if head[4:8] == b"ftyp" else None


def _heif_formats(kind: str) -> tuple[str, ...]:
    """Return Pillow's names of the decoders for HEIC or AVIF that are installed here."""
    try:
        import pillow_heif
    except ImportError:
        Image.init()
        return ("AVIF",) if kind == "AVIF" and "AVIF" in Image.OPEN else ()
    pillow_heif.register_heif_opener()
    return tuple(name for name in ("HEIF", "AVIF") if name in Image.OPEN)


def _name(source: Any) -> str:
    if isinstance(source, ImageBytes):
        return f"picture {source.name!r}"
    name = ImagePart(source).name
    return f"picture {name!r}" if isinstance(source, str | PathLike | StoredImage) else f"the {name}"


def _open_file(source: Any, name: str) -> BinaryIO:
    if isinstance(source, StoredImage):
        label, source = name, source.load()
    else:
        label = name if isinstance(source, ImageBytes) else "the picture"
    if isinstance(source, bytes):
        if not source:
            raise InputError(f"{label} is empty (0 bytes); give the whole file")
        return io.BytesIO(source)
    if not isinstance(source, str | PathLike):
        raise InputError(f"{name} is not a picture; give a path, the bytes of a file, or a PIL image")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise InputError(f"{name} is a web address; save the picture to a file first")
    if source == "":
        raise InputError("the picture's path is empty; name a picture, or give None for no picture")
    path = Path(source)
    with wrong_input(OSError, f"{name} cannot be opened: {CAUSE}; check the path"):
        if path.is_dir():
            raise InputError(f"{name} is a folder; name a picture in it")
        if not path.exists():
            raise InputError(f"{name} does not exist; check the path")
        if not path.is_file():
            raise InputError(f"{name} is not a file; save the picture to a file first")
        if not path.stat().st_size:
            raise InputError(f"{name} is empty (0 bytes); fetch or save it again")
        return path.open("rb")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if not width * height:
        raise InputError(f"{name} has no pixels ({width} x {height}); give another")
    if width * height > MAX_PIXELS:
        raise EnormousImage(
            f"{name} is {width} x {height}, more than {MAX_PIXELS / 1e6:g} megapixels; give a smaller copy"
        )


def _damaged(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name} is truncated or damaged ({reason}); fetch or save it again")


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        turn = _turn(image)
        rgb = _rgb(image)
    except Exception as error:  # as above: what a decoder raises on damaged data is not limited
        raise _damaged(name, error) from error
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    # A PNG may keep its EXIF behind the pixels: before load(), getexif() decodes them. After load(), a TIFF
    # was turned by Pillow itself, and its tag no longer says so.
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the EXIF block is damaged, the pixels need not be
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    # convert("L") would clip everything above 255 to white. "I" is how Pillow gives some 16-bit files.
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    white = max(1.0 if image.mode == "F" else 65535.0, float(values.max()))
    return Image.fromarray(np.rint(values.clip(0, white) * np.float32(255 / white)).astype(np.uint8))


def _normalise(tile: Image.Image, policy: ImagePolicy) -> np.ndarray:
    values = np.empty((3, tile.height, tile.width), np.float32)
    # One plane after the other, which stays in the processor's cache.
    for plane, band, mean, std in zip(values, tile.split(), policy.mean, policy.std, strict=True):
        plane[:] = np.asarray(band)
        plane /= 255
        plane -= np.float32(mean)
        plane /= np.float32(std)
    return values


def _pad(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    if (size := shortened(image.size)) != image.size:  # the square of 1 x 50000 would take ten gigabytes
        image = image.resize(size, Image.Resampling.BOX)
    side = max(image.size)
    if image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    short, long = sorted(image.size)
    if long > LONGEST_CROPPED * short:  # only the middle is seen, and resizing all of it could exhaust memory
        long = LONGEST_CROPPED * short
        image = _middle(image, min(image.width, long), min(image.height, long))
    grown = size * long // short
    start = (grown - size) // 2
    if image.width > image.height:
        # Resize the middle alone where Pillow's box, in single precision, can name it. Pixels stay the same.
        # In tall pictures they would not: given a box, Pillow 13 resizes their height first.
        left, right = (np.float32(place * long / grown) for place in (start, start + size))
        exact = ((left, start), (right, start + size), (right - left, size))
        if all(float(value) * grown == place * long for value, place in exact):
            return image.resize((size, size), resample, (float(left), 0, float(right), short))
    image = image.resize((size, grown) if image.width <= image.height else (grown, size), resample)
    return _middle(image, size, size)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
