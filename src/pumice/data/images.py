"""Decode many images, to find those that cannot be read, that crash a decoder, or that look alike."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pumice.conversation import StoredImage, Video
from pumice.data.processes import map_parts
from pumice.errors import InputError
from pumice.images import open_image, read_image
from pumice.media import VideoPolicy
from pumice.video import read_frames

MIN_FOR_PROCESSES = 64  # fewer images are decoded here: starting a process takes as long
_ALIKE = {"JPEG", "MPO"}  # cameras write several images into one .jpg
IMAGES_PER_TASK = 32  # images that a process gets at once


class Looks(NamedTuple):
    """What an image is compared by: a hash of its file, a perceptual hash of 64 bits, and its shape.

    hash: None where the library of perceptual hashes is not installed.
    """

    contents: bytes
    hash: int | None
    aspect: float  # width / height


class DecodedImage(NamedTuple):
    """The result of decoding an image."""

    unreadable: str = ""  # why it cannot be decoded completely; "" if it can
    kind: str = ""  # its format, if the suffix of its name says another; else ""
    looks: Looks | None = None  # if asked for


def decode_image(source: Path | StoredImage, compare: bool = False) -> DecodedImage:
    """Decode an image and compare its format with its name. compare: also return what it looks like."""
    try:
        data = read_image(source)
        image = open_image(data)
    except InputError as error:
        return DecodedImage(str(error))
    looks = _looks(data, image) if compare else None
    if isinstance(source, StoredImage):
        return DecodedImage(looks=looks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image has checked the size
        with Image.open(io.BytesIO(data)) as picture:
            kind = picture.format or ""
    Image.init()
    named = Image.EXTENSION.get(source.suffix.lower(), kind)
    return DecodedImage("", "" if {named, kind} <= _ALIKE or named == kind else kind, looks)


def decode_video(source: Video) -> DecodedImage:
    """Decode a video to its end."""
    try:
        read_frames(source, VideoPolicy(max_frames=1))
    except InputError as error:
        return DecodedImage(str(error))
    return DecodedImage()


def open_pictures(source: Path | StoredImage | Video) -> list[Image.Image]:
    """Return a picture, or some frames of a video, to be shown to a person. Raises InputError."""
    if isinstance(source, Video):
        return [open_image(frame) for frame in read_frames(source, VideoPolicy(max_frames=4)).images]
    return [open_image(source)]


def _looks(data: bytes, image: Image.Image) -> Looks:
    contents = hashlib.blake2b(data, digest_size=16).digest()
    try:
        import imagehash
    except ImportError:
        return Looks(contents, None, image.width / image.height)
    # The discrete cosine transform of 32 x 32 pixels (pHash), which survives scaling and JPEG.
    return Looks(contents, int(str(imagehash.phash(image)), 16), image.width / image.height)


def decode_all(
    files: Sequence[Path | Video],
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
    *,
    compare: bool = False,
) -> dict[Path | Video, DecodedImage]:
    """Decode images and videos and return the result of each.

    workers: number of processes; 0 decodes in this one. progress: called with the number of images just done.
    compare: as in `decode_image`.
    """
    decoded: dict[Path | Video, DecodedImage] = {}
    workers = workers if len(files) > MIN_FOR_PROCESSES else 0
    size = IMAGES_PER_TASK if workers else 1
    parts = [files[start : start + size] for start in range(0, len(files), size)]
    done = map_parts(partial(_decode_images, compare), parts, workers, _crashed)
    for part, results in zip(parts, done, strict=True):
        decoded.update(zip(part, results, strict=True))
        if progress is not None:
            progress(len(part))
    return decoded


def _decode_images(compare: bool, files: Sequence[Path | Video]) -> list[DecodedImage]:
    return [decode_video(f) if isinstance(f, Video) else decode_image(f, compare) for f in files]


def _crashed(file: Path | Video) -> DecodedImage:
    name = file.name if isinstance(file, Video) else file
    return DecodedImage(f"'{name}' crashes the library that decodes it; remove it")
