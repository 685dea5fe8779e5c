"""Rows as columns, with pictures inside: parquet files, and Arrow files of `datasets.save_to_disk`."""

from __future__ import annotations

import json
import marshal
import tempfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from pumice.conversation import StoredImage
from pumice.data.arrays import kept
from pumice.data.sources.source import Record, Source
from pumice.errors import CAUSE, InputError, library, wrong_input
from pumice.files import cache_folder

BLOCK = 1000  # rows that are read together
_BATCH = 50  # rows that are in memory at once while a block is read
_KEPT_BLOCKS = 16
_LARGE = 4  # blocks


def arrow() -> Any:
    """Return the module pyarrow. Raises InputError where it is not installed."""
    library("pyarrow.parquet", "parquet and Arrow files need pyarrow", "data")
    import pyarrow

    return pyarrow


class _Block:
    """Some rows, with their pictures, in a file on the disk that vanishes with the block."""

    def __init__(self) -> None:
        self._file, self._lock = _temporary_file(), threading.Lock()
        self._ends = array("q", [0])  # of the rows, each behind its pictures
        self._starts = array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, record: Record, pictures: Record) -> None:
        """Append a row. pictures: column -> the value with the bytes of a picture, or a list of them."""
        places = {column: _store(value, self._file) for column, value in pictures.items()}
        self._starts.append(self._file.tell())
        try:
            data = marshal.dumps((record, places))
        except ValueError:  # dates and the like
            data = marshal.dumps(({name: _plain(value) for name, value in record.items()}, places))
        self._file.write(data)
        self._ends.append(self._file.tell())

    def add_damaged(self, reason: str) -> None:
        """Append a row that cannot be read."""
        self._starts.append(self._file.tell())
        self._file.write(marshal.dumps(reason))
        self._ends.append(self._file.tell())

    def row(self, number: int) -> tuple[Record, dict[str, Any]]:
        """Return what a row holds, and of each column with pictures their places: see `_store`.

        Raises ValueError with the reason if the row cannot be read.
        """
        start = self._starts[number]
        stored = marshal.loads(self.read(start, self._ends[number + 1] - start))
        if isinstance(stored, str):
            raise ValueError(stored)
        record, places = stored
        return record, places

    def read(self, start: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return self._file.read(size)

    def __del__(self) -> None:
        self._file.close()  # which removes it; a thread that still reads from it holds the block


class ColumnRows(Source):
    """The rows of parquet or Arrow files, one after the other.

    A block of rows is read at once and goes to a temporary file in the cache folder, so that its rows can be
    asked for in any order and memory stays small. A row group of more than `_LARGE` blocks, which cannot be
    read in parts, is unpacked as a whole, once.
    """

    shuffle_block = BLOCK

    def __init__(self, paths: Sequence[Path], label: str) -> None:
        """Raises InputError when a file is cut off or damaged, or pyarrow is missing."""
        self.files, self.label = list(paths), label
        arrow()
        # Of each row group or record batch: its file, its number there, and its rows.
        self._groups = kept(self.files, "row groups", self._index)["groups"]
        self._ends = np.cumsum(self._groups[:, 2]) if len(self._groups) else np.zeros(0, np.int64)
        self._first_of_file = np.concatenate(
            [[0], np.cumsum(np.bincount(self._groups[:, 0], self._groups[:, 2], len(self.files)))]
        ).astype(np.int64)
        self.form = "Arrow" if self.files and not _is_parquet(self.files[0]) else "parquet"
        self._setup()

    def _setup(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._unpacked: dict[int, _Block] = {}  # of large row groups
        self._kept_blocks = _KEPT_BLOCKS

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_blocks", "_unpacked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._setup()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def keep(self, rows: int) -> None:
        self._kept_blocks = max(_KEPT_BLOCKS, -(-rows // BLOCK))

    def place(self, index: int) -> str:
        file = int(np.searchsorted(self._first_of_file, index, "right")) - 1
        return f"'{self.files[file]}', row {index - int(self._first_of_file[file]) + 1}"

    def record(self, index: int) -> Record:
        number, row = divmod(index, BLOCK)
        try:
            record, places = self._block(number).row(row)
        except ValueError as error:
            raise InputError(f"{self.place(index)}: {error}") from error
        for column, pictures in places.items():
            several = isinstance(pictures, list)
            images = [
                place if place is None or isinstance(place, str) else self._image(index, column, n, place)
                for n, place in enumerate(pictures if several else [pictures])
            ]
            record[column] = images if several else images[0]
        return record

    def _image(self, index: int, column: str, number: int, place: tuple[int, int, str]) -> StoredImage:
        name = f"{self.place(index)[1:].replace(chr(39), '')}, {place[2] or column}"
        return StoredImage(
            (id(self), index, column, number), name, partial(self._picture, index, column, number)
        )

    def _picture(self, index: int, column: str, number: int) -> bytes:
        """Return the bytes of a picture. Its block may have been read anew since the row was."""
        block = self._block(index // BLOCK)
        places = block.row(index % BLOCK)[1][column]
        start, size, _ = places[number] if isinstance(places, list) else places
        return block.read(start, size)

    def _block(self, number: int) -> _Block:
        with self._lock:
            if number in self._unpacked:
                return self._unpacked[number]
            if number not in self._blocks:
                first, last = self._together(number)
                with wrong_input(
                    OSError,
                    f"rows of '{self.label}' do not fit into {cache_folder()} ({CAUSE}); "
                    "set PUMICE_CACHE to a folder with room",
                ):
                    blocks = dict(enumerate(self._read(first * BLOCK, min(len(self), last * BLOCK)), first))
                if len(blocks) > 1:
                    self._unpacked |= blocks
                    return blocks[number]
                self._blocks |= blocks
                while len(self._blocks) > self._kept_blocks:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(number)
            return self._blocks[number]

    def _together(self, number: int) -> tuple[int, int]:
        """Return the first and the last block, exclusive, that are read together with a block."""
        start, end = number * BLOCK, min(len(self), (number + 1) * BLOCK)
        first_group, last_group = np.searchsorted(self._ends, [start, end - 1], "right").tolist()
        for group in range(first_group, last_group + 1):
            rows, group_end = int(self._groups[group, 2]), int(self._ends[group])
            if rows > _LARGE * BLOCK:
                start, end = min(start, group_end - rows), max(end, group_end)
        return start // BLOCK, -(-end // BLOCK)

    def _read(self, start: int, end: int) -> Iterator[_Block]:
        """Yield rows start to end in blocks."""
        block = _Block()
        group = int(np.searchsorted(self._ends, start, "right"))
        while start < end:
            first = int(self._ends[group] - self._groups[group, 2])
            stop = min(end, int(self._ends[group]))
            for row in self._rows(group, start - first, stop - first):
                if len(block) == BLOCK:
                    yield block
                    block = _Block()
                if isinstance(row, str):
                    block.add_damaged(row)
                else:
                    block.add(*row)
            start, group = stop, group + 1
        yield block

    def _rows(self, group: int, start: int, end: int) -> Iterator[tuple[Record, Record] | str]:
        """Yield rows start to end of a row group as `_split` does; where it is damaged, why, for each row."""
        number, own_group, _ = self._groups[group].tolist()
        done, reason = start, "the file has changed since it was opened; run again"
        try:
            for batch in _batches(self.files[number], own_group, start, end):
                for row in _split(batch):
                    yield row
                    done += 1
        except _unreadable() as error:
            reason = f"the file is cut off or damaged here ({_first_line(error)}); fetch it again"
        for _ in range(done, end):
            yield reason

    def _index(self) -> dict[str, np.ndarray]:
        groups: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.files):
            try:
                groups += [(number, group, rows) for group, rows in enumerate(_group_sizes(path))]
            except _unreadable() as error:
                raise InputError(
                    f"'{path}' is cut off or damaged ({_first_line(error)}); fetch it again"
                ) from error
        return {"groups": np.array(groups, np.int64).reshape(-1, 3)}


def _unreadable() -> tuple[type[Exception], ...]:
    """Return the errors that mean that a file is damaged."""
    return arrow().ArrowException, OSError, UnicodeDecodeError


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0].rstrip(".")


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _temporary_file() -> IO[bytes]:
    """Return a file that nobody else sees, in the cache folder: the system's own may lie in memory."""
    folder = cache_folder() / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()


def _arrow_batches(path: Path) -> Any:
    """Return the reader of an Arrow file, in the format for files or the one for streams."""
    pa = arrow()
    source = pa.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        return pa.ipc.open_file(source)
    source.seek(0)
    return pa.ipc.open_stream(source)


def _group_sizes(path: Path) -> list[int]:
    if _is_parquet(path):
        metadata = arrow().parquet.read_metadata(path)
        return [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    reader = _arrow_batches(path)
    if hasattr(reader, "num_record_batches"):
        return [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)]
    return [batch.num_rows for batch in reader]


def _batches(path: Path, group: int, start: int, end: int) -> Iterator[Any]:
    """Yield rows start to end of a row group, or record batch, in small batches."""
    if not _is_parquet(path):
        reader = _arrow_batches(path)
        if hasattr(reader, "num_record_batches"):
            whole = reader.get_batch(group)
        else:
            whole = next(batch for number, batch in enumerate(reader) if number == group)
        yield whole.slice(start, end - start)
        return
    # Without threads and without reading ahead, so that only one batch is in memory.
    file = arrow().parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    row = 0
    for batch in file.iter_batches(_BATCH, row_groups=[group], use_threads=False):
        first, last = max(start, row), min(end, row + batch.num_rows)
        if first < last:
            yield batch.slice(first - row, last - first)
        row += batch.num_rows
        if row >= end:
            return


def _split(batch: Any) -> Iterator[tuple[Record, Record]]:
    """Yield the rows of a batch: the columns without pictures, and those with them."""
    names = _class_names(batch.schema)
    picture_columns = [field.name for field in batch.schema if _holds_pictures(field.type)]
    for record in batch.to_pylist():
        pictures = {column: record.pop(column) for column in picture_columns}
        for column, classes in names.items():
            if isinstance(number := record.get(column), int) and 0 <= number < len(classes):
                record[column] = classes[number]
        yield record, pictures


def _plain(value: Any) -> Any:
    """Return a value as the types of JSON and bytes; others, such as dates, as text."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, str | int | float | bytes) else str(value)


def _holds_pictures(kind: Any) -> bool:
    """Whether a column holds bytes, {bytes, path}, or a list of either."""
    types = arrow().types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    types = arrow().types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _store(value: Any, file: IO[bytes]) -> Any:
    """Write a picture, or each of a list, to `file`. Return (start, size, path); without bytes the path."""
    if isinstance(value, list):
        return [_store(item, file) for item in value]
    path = ""
    if isinstance(value, dict):
        path, value = value.get("path") or "", value["bytes"]
        if value is None and path:
            return path
    if value is None:
        return None
    start = file.tell()
    file.write(value)
    return start, len(value), path


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of the classes of columns that `datasets` stores as numbers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: list(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # it is another program's
        return {}
