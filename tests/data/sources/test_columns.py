"""Rows of columns are read once, whatever their row groups."""

from __future__ import annotations

import pickle
from datetime import date
from pathlib import Path

import pytest
from samples import Examples, nested

from pumice.data.rows import Rows
from pumice.data.sources import columns


@pytest.mark.parametrize("value", [b"", b"[]", b'{"info": {"features": []}}', b"[" * 100_000, b"\xff"])
def test_names_of_classes_that_are_damaged_are_left_out(value: bytes) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    assert columns._class_names(pyarrow.schema([], {"huggingface": value})) == {}
    whole = b'{"info": {"features": {"a": {"_type": "ClassLabel", "names": ["x", "y"]}, "b": 7}}}'
    assert columns._class_names(pyarrow.schema([], {"huggingface": whole})) == {"a": ["x", "y"]}


@pytest.mark.parametrize("group", [3, 7, 24])
def test_rows_of_any_row_group_are_read_once_a_block(
    group: int, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of blocks of two, in any order: small row groups are read for each block, large ones once."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([r | {"day": date(2026, 1, 1)} for r in nested(examples)])
    parquet.write_table(table, tmp_path / "r.parquet", row_group_size=group)
    monkeypatch.setattr(columns, "BLOCK", 2)
    reads: list[tuple[int, int, int]] = []
    batches = columns._batches
    monkeypatch.setattr(columns, "_batches", lambda path, *a: reads.append(a) or batches(path, *a))
    rows = Rows(tmp_path / "r.parquet")
    for index in [*range(23, -1, -1), *range(24)]:
        row = rows[index]
        assert (row.id, row.image[0].load()) == (f"r{index}", examples.bytes_of(examples.rows[index]))
    assert rows.opened.record(0)["day"] == "2026-01-01"
    large = group > 2 * columns._LARGE
    assert len(reads) == (1 if large else len({(a // 2, a // group) for a in range(24)}))
    assert [row.id for row in pickle.loads(pickle.dumps(rows))] == [f"r{n}" for n in range(24)]
