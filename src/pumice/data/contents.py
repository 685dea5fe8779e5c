"""What training must know of all rows before the first step: which are usable, and which pictures they show.

Shapes: R rows, P pictures that they show, repeats counted, U different pictures.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pumice.conversation import StoredImage, Video
from pumice.data.arrays import Arrays
from pumice.errors import InputError
from pumice.images import image_size, read_image

NO_IMAGES = -1  # the key of the rows that show no picture


class RowSummary(NamedTuple):
    """What is kept of a row. usable: its form and turns are right. added: `<image>` was added to it."""

    usable: bool
    added: bool = False
    images: tuple[str | StoredImage | Video, ...] = ()
    words: Any = None  # what else the digest depends on


@dataclass(frozen=True)
class Contents:
    """Arrays about the rows of one source.

    arrays: `usable` (R,) and `added` (R,) bool; `first` (R + 1,), where each row's pictures begin in `shown`
    (P,), numbers of pictures; `keys` (U,), a hash of a picture's name, or of its contents if it is inside the
    source; `sizes` (U, 2), of those inside; `videos` (U,) bool, which are videos; `names` and `name_ends`
    (U,), UTF-8; `digest`, of everything.
    """

    arrays: Arrays

    @property
    def usable(self) -> np.ndarray:
        """(R,) bool: whether a row's form and turns are right; its pictures are not looked at."""
        return self.arrays["usable"]

    @property
    def added(self) -> int:
        """The rows that name pictures without `<image>`."""
        return int(self.arrays["added"].sum())

    @property
    def digest(self) -> str:
        return self.arrays["digest"].tobytes().hex()

    @property
    def has_stored(self) -> bool:
        """Whether any picture is inside the source."""
        return not all(self.names())

    def max_images(self, frames: int) -> int:
        """Return the most pictures that a row shows. frames: as how many a video counts."""
        ends = np.cumsum([0, *np.where(self.arrays["videos"], frames, 1)[self.arrays["shown"]]])
        return int(np.diff(ends[self.arrays["first"]]).max(initial=0))

    @cached_property
    def image_sets(self) -> np.ndarray:
        """(R,) int64: equal for rows that show the same pictures in the same order, NO_IMAGES for none."""
        first, keys = self.arrays["first"], self.arrays["keys"][self.arrays["shown"]]
        counts = np.diff(first)
        sets = np.full(len(counts), NO_IMAGES, np.int64)
        sets[counts == 1] = keys[first[:-1][counts == 1]]
        for row in np.flatnonzero(counts > 1).tolist():
            sets[row] = _hash(keys[first[row] : first[row + 1]].tobytes())
        return sets

    def pictures_of(self, row: int) -> Iterator[tuple[int, tuple[int, int] | None]]:
        """Yield (key, size) of each picture of a row; the size is None if it is not inside the source."""
        first, last = self.arrays["first"][row : row + 2].tolist()
        for number in self.arrays["shown"][first:last].tolist():
            width, height = self.arrays["sizes"][number].tolist()
            yield int(self.arrays["keys"][number]), (width, height) if width else None

    def names(self) -> Iterator[str]:
        """Yield the name of each different picture; "" for one that is inside the source."""
        names, start = self.arrays["names"].tobytes(), 0
        for end in self.arrays["name_ends"].tolist():
            yield names[start:end].decode("utf-8", "surrogatepass")
            start = end

    def files(self) -> Iterator[str | Video | None]:
        """Yield each different picture or video by its name; None for one inside the source."""
        for name, is_video in zip(self.names(), self.arrays["videos"].tolist(), strict=True):
            yield Video(name) if is_video and name else name or None

    def rows_without_images(self, is_there: Callable[[str | Video], bool]) -> np.ndarray:
        """Return (R,) bool: whether a row names a picture or a video for which `is_there` is False."""
        missing = np.array([file is not None and not is_there(file) for file in self.files()], bool)
        if not missing.any():
            return np.zeros(len(self.usable), bool)
        # One more, so that a last row without pictures has a place.
        shown = np.append(missing[self.arrays["shown"]], False)
        counts = np.add.reduceat(shown, np.minimum(self.arrays["first"][:-1], len(shown) - 1), dtype=np.int64)
        return (counts > 0) & (np.diff(self.arrays["first"]) > 0)


def read_contents(rows: Iterable[RowSummary], count: int) -> Arrays:
    """Read all rows once. count: of the rows."""
    usable, added = np.zeros(count, bool), np.zeros(count, bool)
    first, shown = array("q", [0]), array("i")
    numbers: dict[tuple[int, bool], int] = {}
    sizes, names, ends, videos = array("i"), bytearray(), array("q"), array("b")
    digest = hashlib.blake2b(digest_size=32)
    for index, row in enumerate(rows):
        usable[index], added[index] = row.usable, row.added
        keys = []
        for image in row.images:
            is_video = isinstance(image, Video)
            source = image.source if isinstance(image, Video) else image
            data = name = b""
            if inside := isinstance(source, StoredImage):
                data = _bytes(source)
            else:
                name = str(source).encode("utf-8", "surrogatepass")
            # A GIF may be a picture in one row and a video in another.
            key = (_hash(b"video " * is_video + (data or name)), inside)
            keys.append(key[0])
            if key not in numbers:
                numbers[key] = len(numbers)
                sizes.extend(_size(data) if inside and not is_video else (0, 0))
                videos.append(is_video)
                names += name
                ends.append(len(names))
            shown.append(numbers[key])
        first.append(len(shown))
        digest.update(json.dumps([keys, row.words]).encode())
    return {
        "usable": usable,
        "added": added,
        "first": np.array(first, np.int64),
        "shown": np.array(shown, np.int32),
        "keys": np.array([key for key, _ in numbers], np.int64),
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "videos": np.array(videos, bool),
        "names": np.frombuffer(bytes(names), np.uint8),
        "name_ends": np.array(ends, np.int64),
        "digest": np.frombuffer(digest.digest(), np.uint8),
    }


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _bytes(image: Any) -> bytes:
    try:
        return read_image(image)
    except InputError:  # empty, which is told when the picture is opened
        return b""


def _size(data: bytes) -> tuple[int, int]:
    """Return the size of a picture; (0, 0) if it is none, which is told when it is opened."""
    try:
        return image_size(data)
    except InputError:
        return 0, 0
