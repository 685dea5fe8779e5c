"""Official files: how they are found and read, and the errors for damaged ones."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path

import pytest

from pumice.errors import InputError
from pumice.evaluate.files import (
    DataFile,
    ImageFolders,
    base64_image,
    locate,
    read_json,
    read_jsonl,
    read_tsv,
    search,
)


def test_a_file_is_found_below_in_a_zip_or_as_itself(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.json").write_text("1")
    assert locate(tmp_path, ("y.json", "x.json")).path == tmp_path / "a" / "b" / "x.json"
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("inside/z.json", '{"z": 1}')
    inside = locate(tmp_path, ("z.json",))
    assert (inside.name, read_json(inside)) == ("z.json", {"z": 1})
    assert locate(tmp_path / "all.zip", ("z.json",)).member == "inside/z.json"
    assert locate(tmp_path / "a" / "b" / "x.json", ("x.json",)).name == "x.json"
    assert search(tmp_path, ("w.json",)) is None


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'x.json' or 'y.json' is not in .*; expected x.json and y/"):
        locate(tmp_path, ("x.json", "y.json"), "x.json and y/")
    with pytest.raises(InputError, match="does not exist"):
        locate(tmp_path / "no", ("x.json",))


def test_damaged_files(tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text('[{"a": 1}, {"a"')
    with pytest.raises(
        InputError, match=r"cut off or not JSON \(line 1, column 16: it ends too early\); fetch it again"
    ):
        read_json(DataFile(cut))
    cut.write_text('{"a": 1}\n{"a": 2}\n[3]\n{"a"')
    with pytest.raises(InputError, match="2 of 4 lines are cut off or not JSON, the first is line 3"):
        read_jsonl(DataFile(cut))
    cut.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_json(DataFile(cut))
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match="not a whole zip"):
        search(tmp_path / "no.zip", ("x",))


def test_lines_may_hold_unicode_line_ends_and_a_file_may_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y"}\n\n', encoding="utf-8")
    assert read_jsonl(DataFile(path)) == [{"a": "x\u2028y"}]
    path.write_text(json.dumps([{"a": 1}]))
    assert read_jsonl(DataFile(path)) == [{"a": 1}]


def test_a_table_as_pandas_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('a\tb\n"x ""y""\nz"\tNaN\nnone\t\n', encoding="utf-8")
    assert list(read_tsv(DataFile(path))) == [{"a": 'x "y"\nz', "b": None}, {"a": "none", "b": None}]
    path.write_text("")
    with pytest.raises(InputError, match="is empty"):
        list(read_tsv(DataFile(path)))


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "1.jpg").write_bytes(b"one")
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        archive.writestr("test/2.jpg", b"two")
    pictures = ImageFolders(tmp_path, "val", "test")
    assert pictures.get("1.png", "1.jpg").source() == tmp_path / "val" / "1.jpg"
    assert pictures.get("2.jpg").source() == b"two"
    with pytest.raises(InputError, match=r"picture '3.jpg' is not in .*val' or .*test'"):
        pictures.get("3.jpg").source()
    assert base64_image("x", base64.b64encode(b"abc").decode()).source() == b"abc"
