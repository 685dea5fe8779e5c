"""LLaVA-Instruct rows, read lazily from JSON and JSON Lines files.

Only byte offsets stay in memory; a row is parsed when it is read.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from pumice.conversation import Conversation, check_media, from_llava
from pumice.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_BOM = b"\xef\xbb\xbf"


class ImageFinder:
    """Find the images that rows name in one or several folders ("roots"); the first match counts."""

    def __init__(self, roots: str | PathLike[str] | Sequence[str | PathLike[str]]) -> None:
        """Raises InputError when a root is not a folder or none is given."""
        folders = [roots] if isinstance(roots, str | PathLike) else list(roots)
        if not folders:
            raise InputError("no image folder is given; name at least one")
        self.roots = [Path(root) for root in folders]
        for root in self.roots:
            if not root.is_dir():
                raise InputError(f"the image folder '{root}' does not exist; check the path")

    def find(self, name: str) -> Path:
        """Return the file of image `name`, a path relative to a root or absolute.

        If it is missing, a file of the same stem with another image suffix is returned (mix665K names .jpg
        files that are .gif). Raises InputError when there is none, and for a path that leaves its root.
        """
        if Path(os.path.normpath(name)).parts[:1] == ("..",):
            raise InputError(f"picture {name!r} leads out of the image folders; write the path without '..'")
        candidates = [root / name for root in self.roots]  # an absolute name replaces its root
        for path in candidates:
            if os.path.isfile(path):  # False for an overlong name, where Path.is_file raises
                return path
        for path in candidates:
            for suffix in SUFFIXES:
                for variant in (suffix, suffix.upper()):
                    sibling = path.with_suffix(variant) if path.name else path
                    if os.path.isfile(sibling):
                        return sibling
        if Path(name).is_absolute():
            raise InputError(f"picture {name!r} does not exist; check the path")
        roots = ", ".join(f"'{root}'" for root in self.roots)
        raise InputError(f"picture {name!r} is not in {roots}; fetch it or name its folder")


@dataclass(frozen=True)
class Row:
    """One row as it is in the file: image names, and turns as (speaker, text)."""

    id: str
    image: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    source: str

    def conversation(self, finder: ImageFinder) -> Conversation:
        """Return the row as a checked Conversation with the paths of its images.

        Raises InputError when a picture is missing, the placeholders do not match the pictures, or
        the turns are not question and answer in order.
        """
        images = [finder.find(name) for name in self.image]
        return from_llava(self.id, self.turns, images).check(answered=True)


class Rows(Sequence[Row]):
    """The rows of one file, a JSON list or JSON Lines; the contents decide which.

    Indexing reads the file once. Every access opens the file again, so a Rows can be pickled, forked and
    shared between threads.
    """

    def __init__(self, path: str | PathLike[str], source: str = "") -> None:
        """source: what to call these rows in reports; the file's name without its suffix if empty.

        Raises InputError when the file cannot be read, is not JSON, or holds no rows.
        """
        self.path = Path(path)
        self.source = source or self.path.stem
        try:
            with self.path.open("rb") as file:
                self._spans = _index(file, str(path))
        except OSError as error:
            raise InputError(f"the rows '{path}' cannot be read: {error.strerror}; check the path") from error
        if not len(self._spans):
            raise InputError(f"'{path}' holds no rows; write a JSON list or one JSON object per line")

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Row `index`, from 0 (messages count from 1). Raises InputError when it is malformed."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index] + 1
        prefix = f"'{self.path}', row {number}"
        try:
            values = json.loads(self.raw(index))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{prefix}: this is not JSON ({error}); fix or remove the row") from error
        return _row(values, prefix, str(number), self.source)

    def raw(self, index: int) -> bytes:
        """Row `index` as it is written in the file."""
        start, end = self._spans[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


def _row(values: Any, prefix: str, fallback_id: str, source: str) -> Row:
    if not isinstance(values, dict):
        raise InputError(f"{prefix}: expected an object, found {_kind(values)}")
    row_id = values.get("id", fallback_id)
    if isinstance(row_id, float) and row_id.is_integer():  # pandas writes whole numbers so
        row_id = int(row_id)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        found = json.dumps(row_id) if isinstance(row_id, float) else _kind(row_id)
        raise InputError(f"{prefix}: 'id' must be text or a whole number, found {found}")
    prefix = f"{prefix} (id {str(row_id)!r})"
    check_media(values, prefix)
    image = values.get("image")
    images = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise InputError(f"{prefix}: 'image' must be a path or a list of paths, found {json.dumps(image)}")
    turns = values.get("conversations")
    if turns is None:
        raise InputError(f"{prefix}: 'conversations' is missing; write at least a question and its answer")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{prefix}: 'conversations' must be a list of turns, found {_kind(turns)}")
    pairs = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InputError(f"{prefix}: turn {number} must be an object, found {_kind(turn)}")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise InputError(f"{prefix}: turn {number} must have the texts 'from' and 'value'")
        pairs.append((speaker, text))
    if not any(speaker == "gpt" for speaker, _ in pairs):
        speakers = ", ".join(repr(name) for name in dict.fromkeys(speaker for speaker, _ in pairs))
        known = {speaker for speaker, _ in pairs} <= {"human", "system"}
        raise InputError(
            f"{prefix}: no turn is from 'gpt' (they are from {speakers}), so there is nothing to learn; "
            + ("add an answer or remove the row" if known else "speakers are written 'human' and 'gpt'")
        )
    return Row(str(row_id), tuple(images), tuple(pairs), source)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def _index(file: BinaryIO, name: str) -> np.ndarray:
    """Return where each row begins and ends: (rows, 2) int64 byte offsets."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    while (first := file.read(1)).isspace():
        pass
    file.seek(start)
    spans = _index_list(file, start, name) if first == b"[" else _index_lines(file, start, name)
    return np.array(spans, np.int64).reshape(-1, 2)


def _index_lines(file: BinaryIO, offset: int, name: str) -> list[tuple[int, int]]:
    if b"\0" in file.read(4096):
        raise InputError(f"'{name}' is no text file; give rows as JSON or JSON Lines")
    file.seek(offset)
    spans = []
    for line in file:
        if line.strip():
            spans.append((offset, offset + len(line)))
        offset += len(line)
    return spans


def _index_list(file: BinaryIO, start: int, name: str) -> list[tuple[int, int]]:
    # Latin-1 makes one character of each byte, so the parser's positions are byte offsets. This is safe:
    # the structure of JSON is ASCII, and a row's text is decoded as UTF-8 when the row is read.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        text = str(view, "latin-1")
    parse = json.JSONDecoder().raw_decode
    spans: list[tuple[int, int]] = []
    offset = _skip_blank(text, text.index("[", start) + 1)
    closed = text[offset : offset + 1] == "]"
    while not closed:
        try:
            _, end = parse(text, offset)
        except (ValueError, RecursionError) as error:
            raise _broken_list(name, len(spans) + 1, getattr(error, "pos", offset)) from error
        spans.append((offset, end))
        offset = _skip_blank(text, end)
        closed = text[offset : offset + 1] == "]"
        if not closed:
            if text[offset : offset + 1] != ",":
                raise _broken_list(name, len(spans), offset)
            offset = _skip_blank(text, offset + 1)
    if _skip_blank(text, offset + 1) != len(text):
        raise InputError(f"'{name}': more follows the end of the list, at byte {offset + 1}; fix the file")
    return spans


def _skip_blank(text: str, offset: int) -> int:
    while text[offset : offset + 1] in (" ", "\t", "\r", "\n"):
        offset += 1
    return offset


def _broken_list(name: str, number: int, byte: int) -> InputError:
    return InputError(
        f"'{name}', row {number}: the JSON list is malformed or cut off near byte {byte}; fix the file"
    )
