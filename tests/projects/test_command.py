"""projects/pumice-tiny/command.py: how a script ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "projects" / "pumice-tiny" / "build.py"


def test_wrong_input_ends_a_script_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--photos", tmp_path, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and "captions.json" in line
