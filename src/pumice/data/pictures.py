"""Opening many pictures to see whether it can be done, in several processes.

Knows pictures and processes. A picture that kills the library that opens it is found out, too.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pumice.errors import InputError
from pumice.images import open_image, read_picture

FEW = 64  # pictures for which no processes are started: starting one takes as long as opening these
_ALIKE = {"JPEG", "MPO"}  # cameras write several pictures into one .jpg
TOGETHER = 32  # pictures that are handed to a process at once


class DecodedImage(NamedTuple):
    """What opening a picture told."""

    unreadable: str = ""  # why it cannot be decoded as a whole; "" when it can
    kind: str = ""  # the format that it is in, where the ending of its name says another; else ""


def look(path: Path) -> DecodedImage:
    """Decode a picture and compare its format with its name."""
    try:
        data = read_picture(path)
        open_image(data)
    except InputError as error:
        return DecodedImage(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it has been opened already
        with Image.open(io.BytesIO(data)) as picture:
            kind = picture.format or ""
    Image.init()
    named = Image.EXTENSION.get(path.suffix.lower(), kind)
    return DecodedImage(kind="" if {named, kind} <= _ALIKE or named == kind else kind)


def decode_all(
    paths: Sequence[Path], workers: int = 0, progress: Callable[[int], None] | None = None
) -> dict[Path, DecodedImage]:
    """What each picture is. progress: told how many more are done.

    workers: processes; 0 opens all here.
    """
    found: dict[Path, DecodedImage] = {}
    for some, reasons in _decoded(paths, workers):
        found.update(zip(some, reasons, strict=True))
        if progress is not None:
            progress(len(some))
    return found


def _decoded(paths: Sequence[Path], workers: int) -> Iterator[tuple[Sequence[Path], list[DecodedImage]]]:
    if not workers or len(paths) <= FEW:
        for path in paths:
            yield [path], [look(path)]
        return
    parts = [paths[start : start + TOGETHER] for start in range(0, len(paths), TOGETHER)]
    done = 0
    try:
        # not forked: the threads of other libraries would be copied in the middle of what they do
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for part, reasons in zip(parts, pool.map(_several, parts), strict=True):
                yield part, reasons
                done += 1
    except BrokenProcessPool:
        for part in parts[done:]:
            yield part, [_alone(path) for path in part]


def _several(paths: Sequence[Path]) -> list[DecodedImage]:
    return [look(path) for path in paths]


def _alone(path: Path) -> DecodedImage:
    """In a process of its own, which it may bring down."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(look, path).result()
    except BrokenProcessPool:
        return DecodedImage(f"'{path}' brings down the library that opens it; remove it")
