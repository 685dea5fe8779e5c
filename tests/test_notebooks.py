"""What is kept of the notebooks' runs (`make notebooks`) and of the tutorial's (`make tutorial`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def runner(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    """notebooks/run.py."""
    return load_script(NOTEBOOKS[0].with_name("run.py"))


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept(path: Path, runner: ModuleType) -> None:
    """Every cell was run in order, without an error; the file is small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert path.stat().st_size < runner.LARGEST


def test_the_fine_tuned_model_knows_its_rows() -> None:
    """`make notebooks` trains pumice-tiny itself, and fails unless all answers are right."""
    path = next(path for path in NOTEBOOKS if path.stem == "2-fine-tune")
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "assert all(right)" in cell.source]
    assert [output.text for output in cell.outputs] == ["13 of 13 answers are right\n"]


def test_the_tutorials_example_knows_its_rows() -> None:
    """`make tutorial` trained pumice-tiny itself with these files, and every answer was right."""
    root = Path(__file__).parent.parent
    kept = json.loads((root / ".ci" / "finetune.json").read_text(encoding="utf-8"))
    weights = "src/pumice/models/pumice-tiny/model.safetensors"
    assert set(kept["files"]) >= {"examples/finetune.yaml", "examples/finetune.jsonl", weights}
    for name, digest in kept["files"].items():
        now = hashlib.sha256((root / name).read_bytes()).hexdigest()
        assert now == digest, f"{name} has changed: run `make tutorial`"
    assert kept["right"] == kept["answers"] > 0


def test_an_error_is_an_error(tmp_path: Path, runner: ModuleType) -> None:
    """Also that of a command in a shell."""
    cell = nbformat.v4.new_code_cell("%%bash\nfalse")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "wrong.ipynb")
    with pytest.raises(runner.CellExecutionError):
        runner.run(tmp_path / "wrong.ipynb")
