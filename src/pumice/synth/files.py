"""Read official annotation files piece by piece, so that a file of gigabytes never stands in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pumice.data.sources.json_text import BOM, JsonReader
from pumice.errors import CAUSE, InputError, wrong_input
from pumice.jsonl import wrong_json

_OTHER = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip"}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a UTF-8 file behind its byte-order mark. InputError when it is none, or missing."""
    with wrong_input(OSError, f"'{path}' cannot be read: {CAUSE}; check the path"):
        file = path.open("rb")
    with file:
        start = file.read(4)
        for mark, name in _OTHER.items():
            if start.startswith(mark):
                remedy = "save it as UTF-8" if name.startswith("UTF") else "unpack it"
                raise InputError(f"'{path}' is {name}, not UTF-8 text; {remedy}")
        if not start.strip():
            raise InputError(f"'{path}' is empty; fetch it again")
        file.seek(len(BOM) if start.startswith(BOM) else 0)
        yield file


def items(path: Path, name: str = "") -> Iterator[Any]:
    """Each item of the list `name` in the object of a JSON file, or of the file that is a list, in order."""
    for key, values in _values(path):
        for *_, value in values if isinstance(values, Iterator) else ():
            if key == name:
                yield value


def visual_genome_images(path: Path) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """The number of each picture in Visual Genome's image_data.json, its file's name, and its whole entry."""
    for image in items(path):
        key = image.get("image_id", image.get("id"))
        parts = str(image.get("url") or "").split("/")[-2:]
        yield key, "/".join(parts) if len(parts) == 2 else f"{key}.jpg", image


def pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """Each key and value of the object of a JSON file, in its order; none of a file that is a list."""
    for key, value in _values(path):
        whole = [item for *_, item in value] if isinstance(value, Iterator) else value
        if key:
            yield key, whole


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Each key and value of a JSON file; "" is the key of a file that is a list.

    Lists are iterators, which the caller must exhaust before the next key.
    """
    with opened(path) as file:
        reader = JsonReader(file, file.tell(), decode=True)
        if reader.peek() == "[":
            yield "", reader.items(str(path))
        else:
            yield from reader.sections(str(path))
        reader.check_end(str(path))


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file, blank lines left out."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            with wrong_input(
                UnicodeDecodeError, f"'{path}', line {number} is not UTF-8 text; save it as UTF-8"
            ):
                text = line.decode()
            if text.strip():
                yield number, text.rstrip("\r\n")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line of a JSON Lines file."""
    for number, line in lines(path):
        error_prefix = f"'{path}', line {number}"
        with wrong_json(
            f"{error_prefix}: this is not JSON ({CAUSE}); write one object per line", one_row=True
        ):
            value = json.loads(line)
        if not isinstance(value, dict):
            raise InputError(
                f"{error_prefix}: expected an object, found {line[:40]}; write one object per line"
            )
        yield error_prefix, value


def first_byte(path: Path) -> str:
    """The first character that is not blank: how a file says whether it is JSON."""
    with opened(path) as file:
        return JsonReader(file, file.tell()).peek()
