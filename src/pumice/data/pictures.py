"""Opening many pictures to see whether it can be done, in several processes.

Knows pictures and processes. A picture that kills the library that opens it is found out, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from pumice.errors import InputError
from pumice.images import open_image

FEW = 64  # pictures for which no processes are started: starting one takes as long as opening these
TOGETHER = 32  # pictures that are handed to a process at once


def why_unreadable(path: Path) -> str:
    """Why the picture cannot be decoded as a whole; "" when it can."""
    try:
        open_image(path)
    except InputError as error:
        return str(error)
    return ""


def decode_all(
    paths: Sequence[Path], workers: int = 0, progress: Callable[[int], None] | None = None
) -> dict[Path, str]:
    """Each picture and why it cannot be read ("" when it can). progress: told how many more are done.

    workers: processes; 0 opens all here.
    """
    found: dict[Path, str] = {}
    for some, reasons in _decoded(paths, workers):
        found.update(zip(some, reasons, strict=True))
        if progress is not None:
            progress(len(some))
    return found


def _decoded(paths: Sequence[Path], workers: int) -> Iterator[tuple[Sequence[Path], list[str]]]:
    if not workers or len(paths) <= FEW:
        for path in paths:
            yield [path], [why_unreadable(path)]
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


def _several(paths: Sequence[Path]) -> list[str]:
    return [why_unreadable(path) for path in paths]


def _alone(path: Path) -> str:
    """In a process of its own, which it may bring down."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(why_unreadable, path).result()
    except BrokenProcessPool:
        return f"'{path}' brings down the library that opens it; remove it"
