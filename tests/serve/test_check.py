"""`pumice check` of a folder against a running server."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from pumice.cli import app


def test_a_folder_and_its_server(server: str, tiny_folder: Path) -> None:
    arguments = ["--against", f"{server}/v1", "--new-tokens", "4", "--json"]
    result = CliRunner().invoke(app, ["check", str(tiny_folder), *arguments])
    report = json.loads(result.stdout)
    assert report["parts"] is None, report
    [stage] = [stage for stage in report["questions"][1]["stages"] if stage["name"] == "prompt"]
    assert stage["same"]
    # A server that is not there is work that failed.
    result = CliRunner().invoke(app, ["check", str(tiny_folder), "--against", "http://127.0.0.1:9/v1"])
    assert result.exit_code == 1
    assert "http://127.0.0.1:9/v1 did not answer" in result.stderr
