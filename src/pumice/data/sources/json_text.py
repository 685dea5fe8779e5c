"""Rows as JSON: a list, or one object per line. Only byte offsets stay in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pumice.data.arrays import kept
from pumice.data.sources.source import OpenFiles, Record, Source, reading
from pumice.errors import CAUSE, InputError, counted, wrong_input
from pumice.jsonl import json_fault, wrong_json

BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 22  # bytes read at once
# A file of one object with one of these is one row.
_ROW_KEYS = {
    "image", "images", "conversations", "messages", "texts", "question", "questions", "query", "instruction",
    "prompt", "caption", "captions", "text", "answer", "answers", "response", "completion", "objects",
}  # fmt: skip
_NEAR_END = 16  # characters: a number or `false` that the end of a block cuts is shorter


class JsonReader:
    """Parse the values of a JSON file one after the other, without the whole file in memory.

    Latin-1 makes one character of each byte, so positions are byte offsets. This is safe: the structure of
    JSON is ASCII, and a row's text is decoded as UTF-8 when the row is read.
    """

    def __init__(self, file: BinaryIO, start: int = 0, *, decode: bool = False) -> None:
        """start: the byte to begin at; at 0, behind a byte order mark. decode: texts as UTF-8, at once."""
        file.seek(start)
        if not start:
            start = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(start)
        self._file, self._text, self._start, self._at = file, "", start, 0
        self._decode = decode
        self._parse = json.JSONDecoder().raw_decode

    @property
    def offset(self) -> int:
        return self._start + self._at

    def peek(self) -> str:
        """Return the next character that is not blank, "" at the end of the file."""
        while True:
            while self._text[self._at : self._at + 1] in (" ", "\t", "\r", "\n"):
                self._at += 1
            if self._at < len(self._text) or not self._more(_BLOCK):
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Move behind the character that `peek` returned."""
        self._at += 1

    def value(self) -> Any:
        """Return the value that begins here, and move behind it. Raises ValueError where there is none.

        Its texts are decoded as Latin-1, unless the reader decodes them.
        """
        block = _BLOCK
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR_END
                if not (cut and self._more(block)):
                    self._at = error.pos
                    raise
            else:
                # A number at the very end of a block may go on in the next one.
                if end < len(self._text) or not self._more(block):
                    if self._decode and not (text := self._text[self._at : end]).isascii():
                        value = json.loads(text.encode("latin-1"))
                    self._at = end
                    return value
            block *= 2  # so that a value of many blocks is not parsed once for each

    def items(self, name: str) -> Iterator[tuple[int, int, Any]]:
        """Yield (start, end, value) of each item of the list that begins here, and move behind the list.

        name: of the file. Raises InputError where the list is malformed or cut off.
        """
        self.peek()
        self.skip()
        number = 0
        closed = self.peek() == "]"
        while not closed:
            start = self.offset
            try:
                value = self.value()
            except (ValueError, RecursionError) as error:
                raise self.broken(f"'{name}', row {number + 1}: the JSON list", error) from error
            number += 1
            yield start, self.offset, value
            following = self.peek()
            closed = following == "]"
            if not closed:
                if following != ",":
                    raise self.broken(f"'{name}', row {number}: the JSON list", self._missing("a comma"))
                self.skip()
                self.peek()
        self.skip()

    def sections(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield (key, value) of the object that begins here, and move behind it.

        A list's value is an iterator of `items`, which the caller must exhaust before the next key. Raises
        InputError where the object is malformed.
        """
        try:
            if self.peek() != "{":
                raise self._missing("the object")
            self.skip()
            closed = self.peek() == "}"
            while not closed:
                if self.peek() != '"':
                    raise self._missing("a key in double quotes")
                key = self.value()
                if self.peek() != ":":
                    raise self._missing("a colon behind a key")
                self.skip()
                if self.peek() == "[":
                    yield key, self.items(f"{name}, {key}")
                else:
                    yield key, self.value()
                following = self.peek()
                closed = following == "}"
                if not closed:
                    if following != ",":
                        raise self._missing("a comma")
                    self.skip()
                    self.peek()
            self.skip()
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise self.broken(f"'{name}': the JSON object", error) from error

    def check_end(self, name: str) -> None:
        """Raise InputError if more follows than blanks. name: of the file."""
        if self.peek():
            raise InputError(f"'{name}': more follows the end of the JSON, at {self._place()}; fix the file")

    def broken(self, what: str, error: ValueError | RecursionError) -> InputError:
        """Return the error of a value that begins or goes on wrongly here. what: it is called."""
        if isinstance(error, UnicodeDecodeError):
            return InputError(f"{what} is not UTF-8 text at {self._place()}; save the file as UTF-8")
        fault = json_fault(error)
        return InputError(f"{what} is malformed or cut off at {self._place()} ({fault}); fix the file")

    def _missing(self, what: str) -> ValueError:
        """Return the error of something else, or of nothing, where `what` should stand."""
        return ValueError(f"{what} is missing" if self.peek() else "it ends too early")

    def _place(self) -> str:
        """Return the line and the column of `offset`, for messages; of a very long line the byte."""
        end, position = self.offset, self._file.tell()
        line, line_start, at = 1, 0, 0
        self._file.seek(0)
        while at < end and (block := self._file.read(min(_BLOCK, end - at))):
            line += block.count(b"\n")
            if (last := block.rfind(b"\n")) >= 0:
                line_start = at + last + 1
            at += len(block)
        self._file.seek(line_start)
        if end - line_start > _BLOCK:
            place = f"line {line}, byte {end - line_start + 1}"
        else:
            text = self._file.read(end - line_start).decode("utf-8-sig", "replace")
            place = f"line {line}, column {len(text) + 1}"
        self._file.seek(position)
        return place

    def _more(self, size: int) -> bool:
        block = self._file.read(size)
        if block:
            self._text = self._text[self._at :] + block.decode("latin-1")
            self._start, self._at = self._start + self._at, 0
        return bool(block)


class JsonRows(Source):
    """The rows of one file, a JSON list or JSON Lines; the contents decide which."""

    form = "JSON"

    def __init__(self, path: Path) -> None:
        """Raises InputError when the file cannot be read, or is a list that is malformed."""
        self.path, self.label, self.files = path, str(path), [path]
        with reading(path):
            self._spans = kept(self.files, "spans", lambda: {"spans": _index(path)})["spans"]
        self._file = OpenFiles([path])

    def __len__(self) -> int:
        return len(self._spans)

    def record(self, index: int) -> Record:
        not_text = f"{self.place(index)}: this is not UTF-8 text; save the file as UTF-8"
        not_json = f"{self.place(index)}: this is not JSON ({CAUSE}); fix or remove the row"
        with wrong_json(not_json, one_row=True), wrong_input(UnicodeDecodeError, not_text):
            values = read_values(self._file, 0, self._spans[index])
        if not isinstance(values, dict):
            raise InputError(f"{self.place(index)}: expected an object, found {kind(values)}")
        return values


def kind(value: Any) -> str:
    """Return what a JSON value is, for messages."""
    if value is None:
        return "null"
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def read_values(reader: OpenFiles, number: int, span: np.ndarray) -> Any:
    """Return the JSON value at (start, end) of file `number`."""
    start, end = span.tolist()
    return json.loads(reader.read(number, start, end - start))


def _index(path: Path) -> np.ndarray:
    """Return where each row begins and ends: (rows, 2) int64 byte offsets."""
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        reader = JsonReader(file, start)
        first = reader.peek()
        if first == "[":
            spans = _list_spans(reader, str(path))
        elif first != "{" or _has_whole_line(file, reader.offset):
            spans = _line_spans(file, start)
        else:
            spans = _object_spans(file, start, str(path))
        return np.fromiter(chain.from_iterable(spans), np.int64).reshape(-1, 2)


def _has_whole_line(file: BinaryIO, start: int) -> bool:
    """Whether the first line is a JSON value, and others follow: then damaged ones are told one by one."""
    file.seek(start)
    line, _, rest = file.read(_BLOCK).partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def _object_spans(file: BinaryIO, start: int, name: str) -> Iterator[tuple[int, int]]:
    """Return the rows of a file that begins with an object, which is not known to be the first of many lines.

    It may be the only one, and hold the rows as a list: {"data": [...]}. Or all are written over several
    lines.
    Raises InputError where an object holds its rows in another way.
    """
    # 1. Read the first object, if it is one: the first line may be damaged.
    reader = JsonReader(file, start)
    reader.peek()
    begin = reader.offset
    rows: list[tuple[int, int]] = []
    keys: list[str] = []
    row_lists = objects = 0
    try:
        for key, value in reader.sections(name):
            keys.append(key)
            objects += isinstance(value, dict)
            if isinstance(value, Iterator):
                spans = [(*span, _is_row(item)) for *span, item in value]
                if spans and all(is_row for *_, is_row in spans):
                    row_lists, rows = row_lists + 1, [(begin, end) for begin, end, _ in spans]
    except InputError:
        return _line_spans(file, start)
    end = reader.offset
    # 2. The only one holds rows, or is a row.
    if not reader.peek():
        if row_lists == 1 and not _ROW_KEYS & {*keys}:
            return iter(rows)
        if objects == len(keys) > 0:
            raise InputError(
                f"'{name}' is one JSON object of {counted(objects, 'object')}; write a list of rows, or one "
                "object per line"
            )
        return iter([(begin, end)])
    # 3. Several, each in a line of its own or over several lines.
    file.seek(begin)
    if b"\n" not in file.read(end - begin):
        return _line_spans(file, start)
    return _value_spans(JsonReader(file, start), name)


def _is_row(item: Any) -> bool:
    """Whether an item of a list could be a row, and not a turn, a message or a picture of one."""
    return isinstance(item, dict) and not {"role", "from", "user", "bytes", "path"} & item.keys()


def _value_spans(reader: JsonReader, name: str) -> Iterator[tuple[int, int]]:
    while reader.peek():
        begin = reader.offset
        try:
            reader.value()
        except (ValueError, RecursionError) as error:
            raise reader.broken(f"'{name}': the JSON", error) from error
        yield begin, reader.offset


def _line_spans(file: BinaryIO, offset: int) -> Iterator[tuple[int, int]]:
    file.seek(offset)
    for line in file:
        if line.strip():
            yield offset, offset + len(line)
        offset += len(line)


def _list_spans(reader: JsonReader, name: str) -> Iterator[tuple[int, int]]:
    for start, end, _ in reader.items(name):
        yield start, end
    reader.check_end(name)
