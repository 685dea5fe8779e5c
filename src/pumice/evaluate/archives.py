"""Read members of zips and tables in parquet files, with bounds on what they unpack to."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from pumice.errors import CAUSE, InputError, library, shorten, wrong_input

LARGEST_FILE = 1 << 30  # bytes of one file, unpacked; the largest official one has 0.8 GB
EXPANSION = 20  # a parquet file that is larger may hold so many times its size
# The methods that benchmarks are packed with. The library bounds the memory of no other.
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 1  # a bit of a member's flags
_VALUE_BYTES = 8  # of a number in memory, however few bits it takes in the file


def read_bounded(file: IO[bytes], label: str) -> bytes:
    """Return what is left of a file. Raises InputError where that is more than LARGEST_FILE."""
    data = bytearray()
    # In small pieces: `zipfile` unpacks as much as it is asked for, whatever size the member claims.
    while block := file.read(1 << 20):
        data += block
        if len(data) > LARGEST_FILE:
            raise InputError(f"'{label}' has more than {LARGEST_FILE >> 20} MB; fetch it again")
    return bytes(data)


@lru_cache(maxsize=8)
def _archive(path: Path) -> zipfile.ZipFile:
    # A damaged directory makes the library raise errors of many kinds.
    with wrong_input(Exception, f"'{path}' is not a whole zip file ({CAUSE}); fetch it again"):
        return zipfile.ZipFile(path)


def members(path: Path) -> list[str]:
    """Return the names of a zip's members. Raises InputError where it is not a whole zip."""
    return _archive(path).namelist()


def read_member(path: Path, member: str) -> bytes:
    """Return a file in the zip at `path`.

    Raises InputError where it is not there, damaged, encrypted, larger than LARGEST_FILE, or packed by
    another method than deflation.
    """
    label, archive = f"{path}/{member}", _archive(path)
    with wrong_input(KeyError, f"'{path}' has no file {shorten(member)}; fetch the zip again"):
        info = archive.getinfo(member)
    if info.file_size > LARGEST_FILE:
        raise InputError(
            f"'{label}' has {info.file_size >> 20} MB, more than {LARGEST_FILE >> 20}; unpack the right file"
        )
    if info.flag_bits & _ENCRYPTED:
        raise InputError(f"'{label}' is encrypted; unpack the zip yourself")
    if info.compress_type not in _METHODS:
        raise InputError(
            f"'{label}' is packed by method {info.compress_type}, not stored or deflated; unpack the zip "
            "yourself"
        )
    try:
        with archive.open(info) as file:
            return read_bounded(file, label)
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"'{label}' is damaged ({error}); fetch the zip again") from error


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file.

    Raises InputError without pyarrow, where the file is damaged, and where its rows take more memory than
    LARGEST_FILE, or EXPANSION times its size if that is more.
    """
    parquet = library("pyarrow.parquet", "parquet files need pyarrow", "eval")
    from pyarrow import ArrowException

    if not path.is_file():
        raise InputError(f"'{path}' is no regular file; fetch it again")
    limit = max(LARGEST_FILE, EXPANSION * path.stat().st_size)
    try:
        # 1. Refuse by what the file says about itself.
        with parquet.ParquetFile(path) as file:
            unpacked, metadata = _unpacked_bytes(file.metadata), file.metadata
        _check_size(path, unpacked, limit)
        # 2. Read texts as numbers of a dictionary, as most files store them: a long text that many rows
        # repeat takes its memory once, until its size is known.
        columns = [metadata.schema.column(n) for n in range(len(metadata.schema))]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            total = 0
            for batch in file.iter_batches(batch_size=64):
                total += sum(map(_decoded_bytes, batch.columns))
                _check_size(path, total, limit)
                yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"'{path}' is damaged ({error}); fetch it again") from error


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise InputError(
            f"'{path}' unpacks to {size >> 20} MB or more, where {limit >> 20} are allowed; "
            "is this the official file?"
        )


def _unpacked_bytes(metadata: Any) -> int:
    """Return the memory that a parquet file's columns take, texts that repeat counted once."""
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    chunks = [group.column(n) for group in groups for n in range(group.num_columns)]
    return sum(max(chunk.total_uncompressed_size, chunk.num_values * _VALUE_BYTES) for chunk in chunks)


def _decoded_bytes(array: Any) -> int:
    """Return the memory that an Arrow array takes when each value stands for itself."""
    import pyarrow
    from pyarrow import compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary).cast("int64")
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if pyarrow.types.is_struct(kind):
        return sum(map(_decoded_bytes, array.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_map(kind) or pyarrow.types.is_large_list(kind):
        return _decoded_bytes(array.flatten())
    return int(array.nbytes)
