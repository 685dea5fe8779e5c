"""Pumice is light to import: what is loaded is looked at from outside, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pumice

HEAVY = ("torch", "torchvision", "transformers", "peft", "matplotlib")


def loaded_by(code: str) -> list[str]:
    """Which heavy libraries a new interpreter holds after running the code."""
    report = (
        f"import json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", f"{code}\n{report}"]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    loaded: list[str] = json.loads(process.stderr.splitlines()[-1])
    return loaded


def test_the_probe_sees_a_heavy_import() -> None:
    assert loaded_by("import sys, types; sys.modules['torch'] = types.ModuleType('torch')") == ["torch"]


PROTOCOLS = ("protocol", "messages", "answers", "errors", "anthropic", "ollama", "responses", "openapi")


@pytest.mark.parametrize(
    "module",
    ["pumice", "pumice.config", "pumice.conversation", *(f"pumice.serve.{name}" for name in PROTOCOLS)],
)
def test_import_is_light(module: str) -> None:
    assert loaded_by(f"import {module}") == []


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["train", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = f"""
import runpy, sys
sys.argv = ["pumice", *{arguments!r}]
try:
    runpy.run_module("pumice", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(code) == []


def test_public_names() -> None:
    assert dir(pumice) == ["Assistant", "InputError", "__version__", "load"]
    assert issubclass(pumice.InputError, ValueError)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = pumice.lod
