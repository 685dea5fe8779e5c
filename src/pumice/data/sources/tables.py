"""Rows as tables of text: CSV and TSV, with a header."""

from __future__ import annotations

import csv
import io
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pumice.data.arrays import kept
from pumice.data.sources.json_text import BOM
from pumice.data.sources.source import OpenFiles, Record, Source, reading
from pumice.errors import InputError, counted
from pumice.media import PICTURES

_DELIMITERS = "\t,;|"
_LONGEST_NAME = 64  # characters of a column's name


def header_of(line: str) -> tuple[str, list[str]] | None:
    """Return the delimiter and the columns of a table's first line; None if it is no such line."""
    best: tuple[str, list[str]] | None = None
    for delimiter in _DELIMITERS:
        try:
            names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            continue
        unique = len(set(names)) == len(names) > (len(best[1]) if best else 1)
        named = names[1:] if names[:1] == [""] else names  # pandas writes its index without a name
        if unique and all(0 < len(name) <= _LONGEST_NAME and name[0] not in "{[" for name in named):
            best = delimiter, names
    return best


class Table(Source):
    """The rows of a CSV or TSV file. A field in quotes may hold line breaks."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when the file cannot be read, has no header, or never closes a quote."""
        self.path, self.label, self.files = path, str(path), [path]
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        with reading(path):
            with path.open("rb") as file:
                self._start = len(BOM) if file.read(len(BOM)) == BOM else 0
                file.seek(self._start)
                line = file.readline().decode("utf-8", "replace")
            found = header_of(line)
            if found is None:
                raise InputError(f"'{path}' has no header; write the names of its columns in the first line")
            self.delimiter, self.columns = found
            if any(name.lower().endswith(PICTURES) for name in self.columns):
                raise InputError(
                    f"'{path}' has no header, its first line names a picture; write the names of its columns "
                    "above it"
                )
            self._spans = kept(self.files, "table", lambda: {"spans": self._index()})["spans"]
        self.form = "TSV" if self.delimiter == "\t" else "CSV"
        self._file = OpenFiles([path])

    def __len__(self) -> int:
        return len(self._spans)

    def record(self, index: int) -> Record:
        start, end = self._spans[index].tolist()
        data = self._file.read(0, start, end - start)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.place(index)}: this is not UTF-8 text; save the file as UTF-8"
            ) from error
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True))
        if len(cells) != len(self.columns):
            raise InputError(
                f"{self.place(index)}: {counted(len(cells), 'column')} where the header has "
                f"{len(self.columns)}; put "
                "quotes around text that holds the delimiter"
            )
        return {name: cell or None for name, cell in zip(self.columns, cells, strict=True) if name}

    def _index(self) -> np.ndarray:
        """Return where each row begins and ends: (rows, 2) int64 byte offsets."""
        spans = array("q")
        with self.path.open("rb") as file:
            file.seek(self._start)
            lines = _CountedLines(file, self._start)
            start = lines.offset
            try:
                for number, cells in enumerate(csv.reader(lines, delimiter=self.delimiter, strict=True)):
                    if number and cells:
                        spans.extend((start, lines.offset))
                    start = lines.offset
            except csv.Error as error:
                raise InputError(
                    f"{self.place(len(spans) // 2)}: a quote is not closed or stands alone ({error}); write "
                    "a quote inside quotes twice"
                ) from error
        return np.array(spans, np.int64).reshape(-1, 2)


class _CountedLines:
    """The lines of a file as Latin-1, which keeps the structure of UTF-8, and the offset behind the last."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self.offset = file, offset

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.offset += len(line)
            yield line.decode("latin-1")
