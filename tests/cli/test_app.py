"""All commands: statuses, what is printed where, and the options that only pass something on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pumice.assistant import Assistant
from pumice.cli import app


@pytest.mark.parametrize(
    "arguments", [["ask", "--no-such"], ["ask", "--seed", "x"], ["draw"], ["data", "show"]]
)
def test_wrong_usage_is_status_2(run: Any, arguments: list[str]) -> None:
    result = run(*arguments, model=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


def test_a_wrong_choice_is_told_in_plain_words(run: Any) -> None:
    result = run("ask", "What?", "--quantize", "int5", model=False)
    assert result.exit_code == 2
    assert "'int5' is not one of 'auto', 'int8', 'int4', 'none'" in result.stderr
    assert "Value error" not in result.stderr


def test_what_is_missing_is_told_with_what_to_give(run: Any) -> None:
    for command, name, what in (
        ("import", "DST", "The folder to write"),
        ("check", "--against", "The other form"),
    ):
        result = run(command, "folder", model=False)
        assert result.exit_code == 2
        assert re.search(rf"Missing (argument|option) '{name}'\. {what}", result.stderr)


def test_failed_work_is_status_1(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Iterator[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Assistant, "stream", full)
    result = run("ask", "What?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "pumice: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("by", ["torch", "python", "mmap"])
def test_no_memory_is_one_sentence(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        if by == "mmap":
            raise RuntimeError("unable to mmap 9 bytes from file <m>: Cannot allocate memory (12)")
        return torch.empty(1 << 46) if by == "torch" else bytearray(1 << 62)

    monkeypatch.setattr(Assistant, "stream", stream)
    result = run("ask", "What?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("pumice: no memory is left (")
    assert result.stderr.count("\n") == 1


def test_other_faults_of_the_program_keep_their_traceback(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Assistant, "stream", stream)
    assert isinstance(run("ask", "What?").exception, RuntimeError)


def test_train_passes_its_recipe_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import pumice.train

    calls: list[Any] = []
    monkeypatch.setattr(pumice.train, "run", lambda recipe, overrides: calls.append((recipe, overrides)))
    result = run("train", "recipe.yaml", "--set", "seed=1", "--set", "a.b=2", model=False)
    assert (result.exit_code, calls) == (0, [(Path("recipe.yaml"), ["seed=1", "a.b=2"])])


def test_a_missing_recipe(run: Any, refused: Any, folder: Path) -> None:
    refused(run("train", "no.yaml", model=False), "no.yaml")


def test_version() -> None:
    import pumice

    assert CliRunner().invoke(app, ["--version"]).stdout == f"pumice {pumice.__version__}\n"
