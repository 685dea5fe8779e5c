"""`pumice check` of a folder against a running server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from safetensors.torch import load_file, save_file
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


def test_another_model_is_served(
    local: Callable[..., AbstractContextManager[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"decoder.norm.weight": -weights["decoder.norm.weight"]}, other / "model.safetensors")
    with local(folder=other) as url:
        arguments = ["--against", f"{url}/v1", "--model-name", "tiny", "--new-tokens", "4", "--json"]
        result = CliRunner().invoke(app, ["check", str(tiny_folder), *arguments])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["parts"]) == (1, "answer")
