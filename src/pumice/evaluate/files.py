"""Find and read the official files of benchmarks as they are distributed, in folders or zips."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pumice.conversation import Video
from pumice.errors import CAUSE, InputError, counted, shorten, wrong_input
from pumice.evaluate.archives import members, read_bounded, read_member, read_table
from pumice.files import replacing
from pumice.jsonl import parse_json, wrong_json

DEPTH = 4  # levels of folders below --data that are searched

OPTION_COLUMNS = "ABCDEFGH"  # of tables like MMBench's; its own end with D
# Texts that pandas reads as "no value"; the official scripts of MMBench and MMStar use pandas.
_NO_VALUE = frozenset(
    [
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
        "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ImageFile:
    """An image or a video of a question, read only when the question is asked."""

    name: str
    # Returns the path or the bytes of the image, or the video. Raises InputError when it is missing.
    source: Callable[[], Path | bytes | Video] = field(compare=False, repr=False)
    # Says, without reading the image, why it is missing; "" where it exists or is stored in a table.
    problem: Callable[[], str] = field(default=lambda: "", compare=False, repr=False)


@dataclass(frozen=True)
class DataFile:
    """A file in a folder, or (with `member`) inside the zip at `path`.

    example: a right row, where the user wrote the file; an official file has none, and can be fetched.
    """

    path: Path
    member: str = ""
    example: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def remedy(self) -> str:
        """What to do where the file is damaged: the end of a message."""
        return f"a right row is {self.example}" if self.example else "fetch it again"

    @property
    def name(self) -> str:
        return Path(self.member or self.path).name

    def read(self) -> bytes:
        """Return the whole file. Raises InputError where it cannot be read or is too large."""
        if self.member:
            return read_member(self.path, self.member)
        with (
            wrong_input(OSError, f"'{self}' cannot be read: {CAUSE}; check the file"),
            self.path.open("rb") as file,
        ):
            return read_bounded(file, str(self))

    def text(self) -> str:
        """Return the whole file. Raises InputError unless it is UTF-8 (a byte order mark is dropped)."""
        remedy = "save it as UTF-8" if self.example else "fetch it again"
        with wrong_input(UnicodeDecodeError, f"'{self}' is not UTF-8 text; {remedy}"):
            return self.read().decode("utf-8-sig")


def locate(data: Path, names: Sequence[str], layout: str = "") -> DataFile:
    """Return the first of `names` that is below folder `data`, in a zip in it, or `data` itself.

    Raises InputError that states the names and the expected layout.
    """
    file = search(data, names)
    if file is None:
        quoted = " or ".join(f"'{name}'" for name in names)
        remedy = f"expected {layout}" if layout else "fetch it first"
        raise InputError(f"{quoted} is not in '{data}'; {remedy}")
    return file


def search(data: Path, names: Sequence[str]) -> DataFile | None:
    """Do what `locate` does, but return None for a missing file. Raises InputError without `data`."""
    if not data.exists():
        raise InputError(f"the data '{data}' does not exist; check the path")
    if data.is_file():
        if data.suffix == ".zip":
            return _in_zip(data, names)
        return DataFile(data) if data.name in names else None
    if not data.is_dir():  # to open a pipe would wait for its writer
        raise InputError(f"the data '{data}' is neither a folder nor a file; check the path")
    # Look directly in the folder first, then below it, then in zips: the listing of a large folder is slow.
    for name in names:
        if (data / name).is_file():
            return DataFile(data / name)
    paths = _listing(data.resolve(), data.stat().st_mtime_ns)
    for name in names:
        ending = "/" + name
        matches = [path for path in paths if ("/" + path).endswith(ending) and (data / path).is_file()]
        if matches:
            return DataFile(data / min(matches, key=lambda path: (path.count("/"), path)))
    for archive in sorted(path for path in data.glob("*.zip") if path.is_file()):
        if member := _in_zip(archive, names):
            return member
    return None


def _in_zip(archive: Path, names: Sequence[str]) -> DataFile | None:
    for name in names:
        candidates = _by_name(archive).get(name.rpartition("/")[2], ())
        matches = [member for member in candidates if ("/" + member).endswith("/" + name)]
        if matches:
            return DataFile(archive, min(matches, key=len))
    return None


@lru_cache(maxsize=8)
def _by_name(archive: Path) -> dict[str, list[str]]:
    """Index a zip's members by the last part of their name; a zip may hold 100,000 images."""
    by_name: dict[str, list[str]] = {}
    for member in members(archive):
        by_name.setdefault(member.rpartition("/")[2], []).append(member)
    return by_name


@lru_cache(maxsize=4)
def _listing(data: Path, modified_ns: int) -> tuple[str, ...]:
    """List files other than images; `modified_ns` makes the cache read a changed folder again."""
    paths: list[str] = []
    for folder, folders, files in os.walk(data):
        relative = os.path.relpath(folder, data)
        if relative.count(os.sep) >= DEPTH - 1:
            folders.clear()
        folders.sort()
        prefix = "" if relative == "." else Path(relative).as_posix() + "/"
        paths += [prefix + name for name in files if not name.lower().endswith((".jpg", ".jpeg", ".png"))]
    return tuple(sorted(paths))


class ImageFolders:
    """Finds images by name in some folders of a benchmark, or in zips with the names of the folders."""

    def __init__(self, data: Path, *folders: str) -> None:
        self.root = data if data.is_dir() else data.parent
        self.folders = folders

    def get(self, *names: str) -> ImageFile:
        """Return an image that may have any of several file names; messages use the first."""
        return ImageFile(names[0], lambda: self._load(names), lambda: self._problem(names))

    def _find(self, names: Sequence[str]) -> Path | DataFile | None:
        for folder in (*self.folders, ""):
            for name in names:
                path = self.root / folder / name
                if os.path.isfile(path):
                    return path
        for folder in self.folders:
            archive = self.root / f"{folder}.zip"
            if archive.is_file() and (member := _in_zip(archive, names)):
                return member
        return None

    def _problem(self, names: Sequence[str]) -> str:
        if self._find(names) is not None:
            return ""
        folders = " or ".join(f"'{self.root / folder}'" for folder in self.folders or ("",))
        return f"picture '{names[0]}' is not in {folders}; unpack the benchmark's pictures there"

    def _load(self, names: Sequence[str]) -> Path | bytes:
        location = self._find(names)
        if location is None:
            raise InputError(self._problem(names))
        return location if isinstance(location, Path) else location.read()


def read_json(file: DataFile, *keys: str) -> Any:
    """Read a JSON file: an object with all `keys`, if any are given. Raises InputError where it is none."""
    text = file.text()
    with wrong_json(f"'{file}' is cut off or not JSON ({CAUSE}); {file.remedy}"):
        value = json.loads(text)
    if keys:
        require_keys(value, keys, f"'{file}'")
    return value


def read_rows(
    file: DataFile, *keys: str, at: str = "", texts: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, each an object with all `keys`.

    The table is a TSV or parquet file, JSON Lines, a JSON list, the list below the key `at` of a JSON object,
    or (with `at` "*") the object itself, whose keys become the key "key" of its rows. texts: as in
    `read_tsv`. Raises InputError that names the row.
    """
    rows: Iterable[dict[str, Any]]
    if file.name.endswith(".tsv"):
        rows = read_tsv(file, texts)
    elif file.name.endswith(".parquet"):
        if file.member:
            raise InputError(f"'{file}' cannot be read inside a zip; unpack it")
        rows = read_table(file.path)
    elif not at or file.name.endswith(".jsonl"):
        rows = read_jsonl(file)
    elif at == "*":
        value = read_json(file)
        if not isinstance(value, dict):
            raise InputError(f"'{file}' holds no JSON object; is this the official file?")
        rows = ({"key": key, **row} if isinstance(row, dict) else row for key, row in value.items())
    else:
        rows = read_json(file, at)[at]
    asked = file.remedy if file.example else "is this the official file?"
    for number, row in enumerate(rows, 1):
        label = row["key"] if at == "*" and isinstance(row, dict) else f"row {number}"
        require_keys(row, keys, f"'{file}', {label}", asked)
        yield row


def read_lines(file: DataFile) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects of a JSON Lines file, and the numbers of the lines that hold no whole object."""
    rows, broken = [], []
    for number, line in enumerate(file.text().split("\n"), 1):
        if not line.strip():
            continue
        if isinstance(row := parse_json(line), dict):
            rows.append(row)
        else:
            broken.append(number)
    return rows, broken


def read_jsonl(file: DataFile) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file or a JSON list. Raises InputError that counts broken lines."""
    text = file.text().lstrip()
    if text.startswith("["):
        rows = read_json(file)
        for number, row in enumerate(rows if file.example else (), 1):
            if not isinstance(row, dict):
                raise InputError(f"'{file}', row {number} is no object: {shorten(row, 40)}; {file.remedy}")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"'{file}' is not a list of objects; fetch it again")
        return rows
    rows, broken = read_lines(file)
    if broken and file.example:
        line = file.text().split("\n")[broken[0] - 1]
        place = f"'{file}', line {broken[0]}"
        with wrong_json(f"{place}: this is not JSON ({CAUSE}); {file.remedy}", one_row=True):
            json.loads(line)
        raise InputError(f"{place} is no object: {shorten(line, 40)}; {file.remedy}")
    if broken:
        lines = counted(len(broken), "line", "are", of=len(rows) + len(broken))
        raise InputError(
            f"'{file}': {lines} cut off or not JSON, the first is line {broken[0]}; fetch it again"
        )
    return rows


def read_tsv(file: DataFile, texts: Collection[str] = ()) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a table with a header; None where pandas would read no value.

    texts: columns in which only an empty cell is no value: an option may be the word "None" or "NA". Raises
    InputError where the table is empty or damaged.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = csv.reader(io.StringIO(file.text(), newline=""), delimiter="\t")
    with wrong_input(csv.Error, f"'{file}' is damaged ({CAUSE}); {file.remedy}"):
        header = next(rows, None)
        if not header:
            raise InputError(f"'{file}' is empty; {file.remedy}")
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"'{file}', row {number}: {counted(len(row), 'column')} where the header has "
                    f"{len(header)}; "
                    + (file.remedy if file.example else "the file is cut off or damaged, fetch it again")
                )
            yield {
                column: None if cell == "" or (cell in _NO_VALUE and column not in texts) else cell
                for column, cell in zip(header, row, strict=True)
            }


def options(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a row of a table by their letters; every one that stands there.

    Only an empty cell is none, which parquet files of numbers hold as not-a-number.
    """
    values = {letter: row.get(letter) for letter in OPTION_COLUMNS}
    return {
        letter: str(value)
        for letter, value in values.items()
        if value not in (None, "") and not (isinstance(value, float) and math.isnan(value))
    }


def hidden_options(row: Mapping[str, Any]) -> int:
    """Return how many options of a row pandas would read as no value, so that official scripts hide them."""
    return sum(option in _NO_VALUE - {""} for option in options(row).values())


def base64_image(name: str, text: str) -> ImageFile:
    """Return an image that a table holds as base64 text."""

    def load() -> bytes:
        with wrong_input(ValueError, f"picture '{name}' is not base64 ({CAUSE}); fetch the table again"):
            return base64.b64decode(text)

    return ImageFile(name, load)


def bytes_image(name: str, data: bytes) -> ImageFile:
    """Return an image whose file is in memory."""
    return ImageFile(name, lambda: data)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a result or a submission; a failure leaves no half-written file."""
    with replacing(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def require_keys(
    row: Any, keys: Sequence[str], error_prefix: str, remedy: str = "is this the official file?"
) -> None:
    """Raise InputError, which begins with `error_prefix`, unless row is an object with all keys."""
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise InputError(f"{error_prefix}: {', '.join(repr(k) for k in missing)} is missing; {remedy}")
