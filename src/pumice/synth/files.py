"""Read official annotation files piece by piece, so that a file of gigabytes never stands in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pumice.errors import CAUSE, InputError, wrong_input

_BOM = b"\xef\xbb\xbf"
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
        file.seek(len(_BOM) if start.startswith(_BOM) else 0)
        yield file


def items(path: Path, prefix: str) -> Iterator[Any]:
    """Each value below `prefix` of a JSON file ("annotations.item"), in the order of the file."""
    import ijson

    with opened(path) as file:
        values = ijson.items(file, prefix, use_float=True)
        yield from _translated(values, path)


def pairs(path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key and value of the object at `prefix` of a JSON file, in the order of the file."""
    import ijson

    with opened(path) as file:
        yield from _translated(ijson.kvitems(file, prefix, use_float=True), path)


def _translated(values: Iterator[Any], path: Path) -> Iterator[Any]:
    import ijson

    try:
        yield from values
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = error.args[0] if error.args else ""
        if isinstance(reason, bytes):  # the C parser's
            reason = reason.decode("utf-8", "replace")
        reason = str(reason).split("\n")[0].strip()
        if "UTF" in reason.upper():
            raise InputError(f"'{path}' is not UTF-8 text ({reason}); save it as UTF-8") from error
        raise InputError(f"'{path}' is malformed or cut off JSON ({reason}); fetch it again") from error


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
        damaged = f"{error_prefix}: this is not JSON ({CAUSE}); write one object per line"
        with wrong_input((ValueError, RecursionError), damaged):
            value = json.loads(line)
        if not isinstance(value, dict):
            raise InputError(
                f"{error_prefix}: expected an object, found {line[:40]}; write one object per line"
            )
        yield error_prefix, value


def first_byte(path: Path) -> str:
    """The first character that is not blank: how a file says whether it is JSON."""
    with opened(path) as file:
        while (char := file.read(1)).isspace():
            pass
    return char.decode("latin-1")
