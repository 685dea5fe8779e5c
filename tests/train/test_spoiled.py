"""A run with bad rows: it continues within its budget and stops above it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.formats.load import open_model
from pumice.train import run


def test_spoiled_rows_are_skipped_within_the_budget(
    make_recipe: Callable[..., Path], rows: Path, bad_rows: Any, tmp_path: Path
) -> None:
    folder, bad = bad_rows
    path = tmp_path / "mixed.jsonl"
    good = (rows / "rows.jsonl").read_text().splitlines()
    long = (
        '{"id": "long", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "%s"}]}'
    )
    path.write_text("\n".join([*(entry.text for entry in bad), long % ("x" * 300), *good]) + "\n")
    changes = {"data": [{"rows": str(path)}], "pictures": [str(rows), str(folder)], "epochs": 2}
    finished = run(make_recipe("lenient", max_bad_rows=len(bad) + 1, **changes))
    skipped = open_model(finished).provenance["stages"][-1]["skipped_rows"]
    assert skipped == len(bad) + 1
    with pytest.raises(InputError, match=rf"bad rows, max_bad_rows allows {len(bad)}"):
        run(make_recipe("strict", max_bad_rows=len(bad), **changes))


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("is_torn", [True, False])
def test_a_refused_run_leaves_nothing_of_its_own(
    make_recipe: Callable[..., Path], rows: Path, tmp_path: Path, is_new: bool, is_torn: bool
) -> None:
    """A picture that is missing is found before the run, one that is torn when the first step reads it."""
    path = tmp_path / "rows.jsonl"
    if is_torn:
        (tmp_path / "gone.png").write_bytes((rows / "0.png").read_bytes()[:60])
    turns = '[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A dog."}]'
    path.write_text(f'{{"id": "a", "image": "gone.png", "conversations": {turns}}}\n')
    output = tmp_path / "run"
    if not is_new:
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    recipe = make_recipe("refused", data=[{"rows": str(path)}], pictures=[str(tmp_path)], output=str(output))
    with pytest.raises(InputError, match=r"gone\.png"):
        run(recipe)
    assert output.exists() is not is_new
    assert is_new or [path.name for path in output.iterdir()] == ["notes.txt"]
