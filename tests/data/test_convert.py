"""Rows written in another format are the same rows; an interrupted conversion continues."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from samples import Examples, jsonl, llava

from pumice.data.convert import WRITERS, convert
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def two_pictures(examples: Examples, path: Path) -> Rows:
    """The rows, the last of which shows two pictures."""
    values = json.loads(llava(examples.rows, path).path.read_text())
    values[-1]["image"] = ["00.png", "01.png"]
    values[-1]["conversations"][0]["value"] = "<image> or <image>?"
    path.write_text(json.dumps(values))
    return Rows(path)


@pytest.mark.parametrize("form", WRITERS)
def test_there_and_back(form: str, examples: Examples, learned: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = two_pictures(examples, tmp_path / "rows.json")
    before = files(tmp_path / "pictures")
    done: list[int] = []
    finder = ImageFinder(examples.folder)
    counts = convert(rows, tmp_path / "out", form, finder, rows_per_file=7, progress=done.append)
    assert (counts["rows written"], counts["rows left out"], done) == (24, 0, [7, 14, 21, 24])
    out = Rows(tmp_path / "out" / "rows.jsonl" if form == "llava" else tmp_path / "out")
    found = ImageFinder(tmp_path / "out")
    assert [learned(row, found) for row in out] == [learned(row, finder) for row in rows]
    assert [row.id for row in out] == [row.id for row in rows]
    assert files(tmp_path / "pictures") == before
    # And back again, from any format.
    convert(out, tmp_path / "back", "llava", found)
    back = Rows(tmp_path / "back" / "rows.jsonl")
    assert [learned(r, ImageFinder(tmp_path / "back")) for r in back] == [learned(r, finder) for r in rows]


@pytest.mark.parametrize("form", WRITERS)
def test_an_interrupted_conversion_continues(form: str, examples: Examples, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows, finder = llava(examples.rows, tmp_path / "rows.json"), ImageFinder(examples.folder)
    convert(rows, tmp_path / "whole", form, finder, rows_per_file=5)

    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done == 15:
            raise Killed

    with pytest.raises(Killed):
        convert(rows, tmp_path / "out", form, finder, rows_per_file=5, progress=kill)
    (tmp_path / "out" / ".rows-00003.half").write_text("what a kill left")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(f"rows-*{WRITERS[form][0]}")}
    assert len(times) == 3
    convert(rows, tmp_path / "out", form, finder, rows_per_file=5)
    if form != "llava":
        assert all(path.stat().st_mtime_ns == time for path, time in times.items()), (
            "they are not written again"
        )
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    # The same command once more writes nothing.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    done: list[int] = []
    counts = convert(rows, tmp_path / "out", form, finder, rows_per_file=5, progress=done.append)
    assert (counts["rows written"], done[-1]) == (24, 24)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_what_is_refused(examples: Examples, tmp_path: Path) -> None:
    rows, finder = llava(examples.rows, tmp_path / "rows.json"), ImageFinder(examples.folder)
    with pytest.raises(InputError, match="there is no form 'csv'; use one of llava, parquet, webdataset"):
        convert(rows, tmp_path / "out", "csv", finder)
    with pytest.raises(InputError, match="pictures is not empty; name a new folder"):
        convert(rows, examples.folder, "llava", finder)
    convert(rows, tmp_path / "out", "llava", finder)
    with pytest.raises(InputError, match=r"holds another conversion, or '.*rows\.json' has changed"):
        convert(rows, tmp_path / "out", "webdataset", finder)
    for damaged in (b"", b"[" * 100_000, b"\xff"):
        (tmp_path / "out" / "convert.json").write_bytes(damaged)
        with pytest.raises(InputError, match="holds another conversion"):
            convert(rows, tmp_path / "out", "llava", finder)
    values = json.loads((tmp_path / "rows.json").read_text())
    values[3]["image"] = "gone.png"
    mixed = Rows(jsonl(tmp_path / "mixed.jsonl", [*values, {"id": "x"}]))
    with pytest.raises(InputError, match=r"2 rows cannot be used, 1 may be left out; the first: .*gone\.png"):
        convert(mixed, tmp_path / "new", "llava", finder, max_bad_rows=1)
    assert not (tmp_path / "new").exists()
    counts = convert(mixed, tmp_path / "new", "llava", finder, max_bad_rows=2)
    assert counts["rows left out"] == 2
    assert [row.id for row in Rows(tmp_path / "new" / "rows.jsonl")] == [
        v["id"] for v in values if v["id"] != "r3"
    ]
