"""Run the notebooks from the top and keep their outputs: `make notebooks`.

    python notebooks/run.py [NAME ...] [--check]

--check writes nothing, and fails where a run gives outputs of other kinds than those kept. What a run leaves
(runs/) goes into a temporary folder. Outputs are kept small: progress on stderr, times and prompts are
dropped, so that running again changes only what changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

__all__ = ["LARGEST", "CellExecutionError", "run"]

HERE = Path(__file__).parent
LARGEST = 200_000  # bytes of a notebook with its outputs


def run(path: Path, *, seconds: int = 600) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in a fresh kernel; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    # `pumice` in a shell cell is this environment's.
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        shutil.copytree(HERE.parent / "examples", Path(folder) / "examples")
        client = NotebookClient(
            notebook,
            timeout=seconds,
            startup_timeout=seconds,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environ)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs, folder)
    return notebook


def _kept(outputs: list[nbformat.NotebookNode], folder: str) -> list[nbformat.NotebookNode]:
    """Outputs without stderr and the temporary folder's name, pieces of one text joined."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout":
            text = output.text.replace(folder, "...")
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += text
            else:
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    return kept


def _kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    return [[output.output_type for output in cell.get("outputs", ())] for cell in notebook.cells]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="all of them when none is given")
    parser.add_argument("--check", action="store_true", help="run only, write nothing")
    options = parser.parse_args()
    for path in [Path(name) for name in options.names] or sorted(HERE.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = run(path)
        text = nbformat.writes(notebook) + "\n"
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {len(text):,} bytes", flush=True)
        if len(text) > LARGEST:
            print(
                f"{path.name} is larger than {LARGEST:,} bytes with its outputs; print less", file=sys.stderr
            )
            return 1
        if not options.check:
            path.write_text(text, encoding="utf-8")
        elif _kinds(notebook) != _kinds(nbformat.read(path, as_version=4)):
            print(f"{path.name} keeps other outputs than a run gives; run make notebooks", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
