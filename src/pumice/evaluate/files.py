"""Official files as they are distributed: found by name, in folders or zips, and read with plain errors.

Knows: JSON, JSON Lines, TSV with base64 pictures, parquet, zip. Does not know: any benchmark.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from pumice.errors import InputError
from pumice.files import replacing

DEPTH = 4  # folders below --data in which a file is looked for

# What pandas reads as "no value"; the official scripts of MMBench and MMStar read their tables with it.
_NOTHING = frozenset(
    [
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
        "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ImageFile:
    """A picture of a question, opened only when it is asked about."""

    name: str
    load: Callable[[], Path | bytes] = field(compare=False, repr=False)
    # What is wrong with a picture outside of a table, found without reading it; "" where nothing is.
    wrong: Callable[[], str] = field(default=lambda: "", compare=False, repr=False)

    def source(self) -> Path | bytes:
        """A path or the bytes of the file. Raises InputError when it is missing or damaged."""
        return self.load()


@dataclass(frozen=True)
class DataFile:
    """A file of a benchmark: in a folder, or a member of a zip."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        return Path(self.member or self.path).name

    def open(self) -> IO[bytes]:
        try:
            return _archive(self.path).open(self.member) if self.member else self.path.open("rb")
        except OSError as error:
            raise InputError(f"'{self}' cannot be read: {error.strerror or error}; check the file") from error

    def text(self) -> str:
        with self.open() as file:
            try:
                return file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"'{self}' is not UTF-8 text; fetch it again") from error


@lru_cache(maxsize=8)
def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InputError(f"'{path}' is not a whole zip file ({error}); fetch it again") from error


def locate(data: Path, names: Sequence[str], layout: str = "") -> DataFile:
    """The first of `names` that is below folder `data`, in a zip beside it, or `data` itself.

    Raises InputError that says what was looked for, and the layout that is expected.
    """
    found = search(data, names)
    if found is None:
        wanted = " or ".join(f"'{name}'" for name in names)
        raise InputError(
            f"{wanted} is not in '{data}'{'; expected ' + layout if layout else '; fetch it first'}"
        )
    return found


def search(data: Path, names: Sequence[str]) -> DataFile | None:
    """As `locate`, None where there is none. Raises InputError when `data` does not exist."""
    if not data.exists():
        raise InputError(f"the data '{data}' does not exist; check the path")
    if data.is_file():
        if data.suffix == ".zip":
            return next((f for name in names if (f := _in_zip(data, name))), None)
        return DataFile(data) if data.name in names else None
    for name in names:
        if (data / name).is_file():
            return DataFile(data / name)
    below = _below(data)
    for name in names:
        ending = "/" + name
        matches = [path for path in below if ("/" + path).endswith(ending)]
        if matches:
            return DataFile(data / min(matches, key=lambda path: (path.count("/"), path)))
    for archive in sorted(data.glob("*.zip")):
        for name in names:
            if member := _in_zip(archive, name):
                return member
    return None


def _in_zip(archive: Path, name: str) -> DataFile | None:
    same = _members(archive).get(name.rpartition("/")[2], ())
    members = [member for member in same if ("/" + member).endswith("/" + name)]
    return DataFile(archive, min(members, key=len)) if members else None


@lru_cache(maxsize=8)
def _members(archive: Path) -> dict[str, list[str]]:
    """A zip's members by the last part of their name; there may be a hundred thousand pictures."""
    found: dict[str, list[str]] = {}
    for member in _archive(archive).namelist():
        found.setdefault(member.rpartition("/")[2], []).append(member)
    return found


@lru_cache(maxsize=4)
def _listing(data: Path, changed: int) -> tuple[str, ...]:
    found = []
    for folder, folders, files in os.walk(data):
        inside = os.path.relpath(folder, data)
        if inside.count(os.sep) >= DEPTH - 1:
            folders.clear()
        folders.sort()
        prefix = "" if inside == "." else Path(inside).as_posix() + "/"
        found += [prefix + name for name in files if not name.lower().endswith((".jpg", ".jpeg", ".png"))]
    return tuple(sorted(found))


def _below(data: Path) -> tuple[str, ...]:
    return _listing(data.resolve(), data.stat().st_mtime_ns)


class Pictures:
    """Pictures by name below the folder of a benchmark: in one of its folders, or in a zip of that name."""

    def __init__(self, data: Path, *folders: str) -> None:
        self.root = data if data.is_dir() else data.parent
        self.folders = folders

    def get(self, *names: str) -> ImageFile:
        """The first that exists of several names for one picture; the first is what it is called."""
        return ImageFile(names[0], lambda: self._load(names), lambda: self._wrong(names))

    def _place(self, names: Sequence[str]) -> Path | DataFile | None:
        for folder in (*self.folders, ""):
            for name in names:
                path = self.root / folder / name
                if os.path.isfile(path):
                    return path
        for folder in self.folders:
            archive = self.root / f"{folder}.zip"
            if archive.is_file():
                for name in names:
                    if member := _in_zip(archive, name):
                        return member
        return None

    def _wrong(self, names: Sequence[str]) -> str:
        if self._place(names) is not None:
            return ""
        places = " or ".join(f"'{self.root / folder}'" for folder in self.folders or ("",))
        return f"picture '{names[0]}' is not in {places}; unpack the benchmark's pictures there"

    def _load(self, names: Sequence[str]) -> Path | bytes:
        place = self._place(names)
        if place is None:
            raise InputError(self._wrong(names))
        if isinstance(place, Path):
            return place
        with place.open() as file:
            return file.read()


def read_json(file: DataFile) -> Any:
    """Raises InputError where the file is cut off or no JSON."""
    try:
        return json.loads(file.text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is cut off or not JSON ({error}); fetch it again") from error


def read_object(file: DataFile) -> dict[str, Any]:
    """As `read_json`; raises InputError where the file holds anything but one object."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise InputError(f"'{file}' holds no JSON object; is this the official file?")
    return found


def read_lines(file: DataFile) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a JSON Lines file, and the numbers of lines that are cut off or no object."""
    rows, broken = [], []
    for number, line in enumerate(file.text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    return rows, broken


def read_jsonl(file: DataFile) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, or of a JSON list. Raises InputError that counts the broken lines."""
    text = file.text().lstrip()
    if text.startswith("["):
        rows = read_json(file)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"'{file}' is not a list of objects; fetch it again")
        return rows
    rows, broken = read_lines(file)
    if broken:
        raise InputError(
            f"'{file}': {len(broken)} of {len(rows) + len(broken)} lines are cut off or not JSON, "
            f"the first is line {broken[0]}; fetch it again"
        )
    return rows


def read_tsv(file: DataFile) -> Iterator[dict[str, str | None]]:
    """Rows of a table with a header; None where pandas would read no value."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t")
        try:
            header = next(rows, None)
            if not header:
                raise InputError(f"'{file}' is empty; fetch it again")
            for number, row in enumerate(rows, 2):
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"'{file}', row {number}: {len(row)} columns where the header has {len(header)}; "
                        "the file is cut off or damaged, fetch it again"
                    )
                yield {k: None if v in _NOTHING else v for k, v in zip(header, row, strict=True)}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"'{file}' is damaged ({error}); fetch it again") from error


def read_parquet(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Rows of parquet files. Raises InputError where pyarrow is not installed or a file is damaged."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow; install it: pip install 'pumice[eval]'") from error
    for path in files:
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
                yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise InputError(f"'{path}' is damaged ({error}); fetch it again") from error


def base64_picture(name: str, text: str) -> ImageFile:
    """A picture written into a table."""

    def load() -> bytes:
        try:
            return base64.b64decode(text, validate=False)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"picture '{name}' is not base64 ({error}); fetch the table again") from error

    return ImageFile(name, load)


def bytes_picture(name: str, data: bytes) -> ImageFile:
    return ImageFile(name, lambda: data)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a result or a submission, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def need(row: Any, keys: Sequence[str], where: str) -> None:
    """Raise InputError unless row is an object with all keys."""
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise InputError(
            f"{where}: {', '.join(repr(k) for k in missing)} is missing; is this the official file?"
        )
