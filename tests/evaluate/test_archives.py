"""Damaged and hostile zips and parquet files end in one sentence, and take no more memory than they may."""

from __future__ import annotations

import io
import os
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.evaluate import archives
from pumice.evaluate.archives import read_member
from pumice.evaluate.files import DataFile, ImageFolders, locate, read_json, read_rows, search

TEXT = b'{"a": "' + b"".join(b"%x" % (n * n) for n in range(500)) + b'"}'


@pytest.fixture(autouse=True)
def opened_anew() -> Iterator[None]:
    """Zips are kept open by their path, and tests write another to the same path."""
    yield
    archives._archive.cache_clear()


def zipped(data: bytes = TEXT, method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x.json", data)
    return bytearray(file.getvalue())


def set_in_directory(data: bytearray, offset: int, layout: str, value: int) -> bytearray:
    """Change a field of the first entry of a zip's directory."""
    struct.pack_into(layout, data, data.rindex(b"PK\x01\x02") + offset, value)
    return data


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_bit_of_a_member_is_noticed(tmp_path: Path, seed: int) -> None:
    data, rng = zipped(), random.Random(seed)
    begin = 30 + len("x.json")  # after the member's header
    for number in range(24):
        path = tmp_path / f"{number}.zip"
        damaged = bytearray(data)
        damaged[rng.randrange(begin, data.index(b"PK\x01\x02"))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{number}\.zip/x\.json' is damaged \(.*fetch the zip again"):
            read_json(locate(path, ("x.json",)))


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_of_a_zip(tmp_path: Path, seed: int) -> None:
    data, rng = zipped(), random.Random(seed)
    refused = 0
    for number in range(150):
        path = tmp_path / f"{number}.zip"
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(damaged[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            file = search(path, ("x.json",))
            assert file is None or file.read() == TEXT
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 75


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (set_in_directory(zipped(), 8, "<H", 1), "is encrypted; unpack the zip yourself"),
        (set_in_directory(zipped(), 10, "<H", 98), "is packed by method 98, not stored or deflated"),
        (zipped(method=zipfile.ZIP_LZMA), "is packed by method 14, not stored or deflated"),
        (set_in_directory(zipped(), 24, "<I", 3 << 30), r"has 3072 MB, more than 1024; unpack the right"),
    ],
)
def test_what_cannot_be_unpacked(tmp_path: Path, data: bytearray, message: str) -> None:
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(InputError, match=rf"x\.zip/x\.json' {message}"):
        read_json(locate(tmp_path, ("x.json",)))


def test_a_file_that_is_not_in_the_zip(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped())
    with pytest.raises(InputError, match=r"x\.zip' has no file 'y\.json'; fetch the zip again"):
        read_member(tmp_path / "x.zip", "y.json")


def test_a_member_may_claim_to_be_small(tmp_path: Path) -> None:
    """64 MB of zeros that claim 10 bytes are not unpacked to find that out."""
    (tmp_path / "x.zip").write_bytes(set_in_directory(zipped(bytes(1 << 26)), 24, "<I", 10))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"x\.json' is damaged"):
            read_member(tmp_path / "x.zip", "x.json")
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST_FILE", 1 << 20)
    (tmp_path / "x.json").write_bytes(b" " * (1 << 20) + b"1")
    with pytest.raises(InputError, match=r"x\.json' has more than 1 MB; fetch it again"):
        read_json(DataFile(tmp_path / "x.json"))
    (tmp_path / "x.json").write_bytes(b" " * ((1 << 20) - 1) + b"1")
    assert read_json(DataFile(tmp_path / "x.json")) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes as POSIX has them")
def test_folders_and_pipes_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.zip").mkdir()
    os.mkfifo(tmp_path / "b.zip")
    os.mkfifo(tmp_path / "x.json")
    (tmp_path / "val.zip").mkdir()
    with pytest.raises(InputError, match=r"'x\.json' is not in"):
        locate(tmp_path, ("x.json",))
    with pytest.raises(InputError, match=r"picture '1\.jpg' is not in"):
        ImageFolders(tmp_path, "val").get("1.jpg").source()
    with pytest.raises(InputError, match=r"b\.zip' is neither a folder nor a file; check the path"):
        locate(tmp_path / "b.zip", ("x.json",))
    with pytest.raises(InputError, match=r"'x\.json' is not in .*a\.zip"):
        locate(tmp_path / "a.zip", ("x.json",))
    pytest.importorskip("pyarrow")
    (tmp_path / "s.parquet").mkdir()
    os.mkfifo(tmp_path / "t.parquet")
    for name in ("s.parquet", "t.parquet"):
        with pytest.raises(InputError, match=rf"{name}' is no regular file"):
            list(archives.read_table(tmp_path / name))


def write_parquet(path: Path, columns: dict[str, Any], **how: Any) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **how)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        {"a": "x", "image": {"bytes": b"\xff", "path": None}, "options": ["p", "q"], "n": 1},
        {"a": None, "image": {"bytes": b"\xff", "path": "é"}, "options": [], "n": 2},
        {"a": "x", "image": None, "options": None, "n": None},
    ]
    write_parquet(tmp_path / "t.parquet", {key: [row[key] for row in rows] for key in rows[0]})
    assert list(read_rows(DataFile(tmp_path / "t.parquet"), "a")) == rows


@pytest.mark.parametrize("codec", ["zstd", "snappy", "none"])
@pytest.mark.parametrize("kind", ["text", "bytes", "struct", "list", "numbers", "one list of numbers"])
def test_tables_that_unpack_to_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, codec: str
) -> None:
    """Each is small on the disk: long values that repeat, or many equal numbers."""
    monkeypatch.setattr(archives, "LARGEST_FILE", 1 << 22)
    monkeypatch.setattr(archives, "EXPANSION", 2)
    text = "x" * 100_000
    column: list[Any] = {
        "text": [text] * 200,
        "bytes": [text.encode()] * 200,
        "struct": [{"bytes": text.encode()}] * 200,
        "list": [[text] * 100] * 2,
        "numbers": [7] * 3_000_000,
        "one list of numbers": [[7] * 3_000_000],
    }[kind]
    path = tmp_path / "t.parquet"
    write_parquet(path, {"a": column}, compression=codec)
    assert path.stat().st_size < 1 << 20
    # The numbers are counted before the first of them is unpacked.
    size = 3_000_000 * 8 >> 20 if "numbers" in kind else r"\d+"
    with pytest.raises(InputError, match=rf"t\.parquet' unpacks to {size} MB or more, where \d are allowed"):
        list(read_rows(DataFile(path)))


@pytest.mark.parametrize("seed", range(2))
def test_any_bytes_of_a_table(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "t.parquet", random.Random(seed)
    write_parquet(path, {"a": [f"text {n}" for n in range(50)], "n": list(range(50))})
    data, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            for row in read_rows(DataFile(path)):
                assert isinstance(row, dict)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50
