"""What a run shows while it trains."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pumice.errors import InputError, WorkError
from pumice.files import hold
from pumice.train import report as report_module
from pumice.train.recipe import load_recipe
from pumice.train.report import TrainingReport, output_folder, time_left

FILES, FOLDERS = ("recipe.yaml", "metrics.jsonl", "wandb.json"), ("tensorboard", "wandb")  # of a run


def write_run(output: Path) -> None:
    """Write what a run with all trackers writes before its first step."""
    for name in FOLDERS:
        (output / name).mkdir(exist_ok=True)
    for path in (*(output / name for name in FILES), *(output / name / "events" for name in FOLDERS)):
        path.write_text("the run's")


def refuse(output: Path) -> None:
    with pytest.raises(WorkError, match="at its first step"), output_folder(output, lambda: False):
        write_run(output)
        raise WorkError("at its first step")


@pytest.mark.parametrize(
    ("term", "columns", "shown"),
    [
        ("xterm", "100", r".*1/12 steps loss 2\.500  40 tokens/s .*"),
        ("xterm", "40", r"1/12 steps loss 2\.500  40 .*"),
        ("dumb", "40", r"1 of 12 steps, loss 2\.500  40 tokens/s  \d+ s left"),
    ],
)
def test_steps_are_counted_on_every_terminal(
    make_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    term: str,
    columns: str,
    shown: str,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for name, value in {"TERM": term, "COLUMNS": columns}.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(make_recipe(name="fine-tuning"))
    with TrainingReport(
        recipe, ["a line that is longer than forty columns, but whole"], 0, 12, None
    ) as report:
        report.step(1, {"loss": 2.5}, 80, 2.0)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    assert lines[0] == "a line that is longer than forty columns, but whole"
    assert any(re.fullmatch(shown, line.strip()) for line in lines), lines


def test_at_the_end_no_time_is_left(
    make_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with TrainingReport(load_recipe(make_recipe()), [], 11, 12, None) as report:
        report.step(12, {"loss": 2.5}, 80, 2.0)
    assert capsys.readouterr().err.splitlines()[-1] == "12 of 12 steps, loss 2.500  40 tokens/s"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s left"), (59, "59 s left"), (60, "1 min left"), (5400, "90 min left")]
)
def test_the_time_left_is_never_zero_minutes(seconds: float, shown: str) -> None:
    assert time_left(seconds) == shown


def test_nothing_of_a_refused_run_stays(tmp_path: Path) -> None:
    refuse(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    refuse(tmp_path / "runs" / "mine" / "first")
    assert not (tmp_path / "runs").exists()
    with (
        pytest.raises(InputError, match="cannot be made"),
        output_folder(tmp_path / "runs" / ("long" * 99), lambda: False),
    ):
        raise AssertionError("it has no folder")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty")
    assert [*(tmp_path / "empty").iterdir()] == []


@pytest.mark.parametrize("mine", [*FILES, *FOLDERS, "checkpoints"])
def test_what_was_there_before_a_refused_run_stays(tmp_path: Path, mine: str) -> None:
    path = tmp_path / mine
    if mine in FILES:
        path.write_text("mine")
    else:
        path.mkdir()
        path = path / "mine.txt"
        path.touch()
    refuse(tmp_path)
    assert path.is_file() and [child.name for child in tmp_path.iterdir()] == [mine]


def test_a_run_that_has_begun_stays(tmp_path: Path) -> None:
    with pytest.raises(WorkError), output_folder(tmp_path / "run", lambda: True):
        write_run(tmp_path / "run")
        raise WorkError("at its second step")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {*FILES, *FOLDERS}  # its checkpoints hold none


def test_a_run_with_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(WorkError), output_folder(tmp_path / "run", lambda: True):
        (tmp_path / "run" / "checkpoints" / "step-000001").mkdir()
        raise WorkError("at its second step")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["checkpoints", "step-000001"]


def test_nobody_begins_in_a_folder_that_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []

    def clear(path: Path, ignore_errors: bool) -> None:
        with pytest.raises(InputError, match="another run"):
            hold(tmp_path / "run" / ".lock", "here")
        cleared.append(path.name)

    monkeypatch.setattr(report_module.shutil, "rmtree", clear)
    refuse(tmp_path / "run")
    assert sorted(cleared) == ["checkpoints", *FOLDERS]


def test_a_run_that_began_at_the_same_time_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(lock: Path, use: str) -> None:
        write_run(lock.parent)
        lock.touch()
        raise InputError(f"another run is {use}")

    monkeypatch.setattr(report_module, "hold", held)
    with pytest.raises(InputError, match="another run is using"), output_folder(tmp_path, lambda: False):
        raise AssertionError("it has no lock")
    assert all((tmp_path / name).exists() for name in ("checkpoints", ".lock", *FILES, *FOLDERS))


def test_why_a_run_ended_is_told_also_where_its_folder_is_gone(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(WorkError, match="at its first step"), output_folder(output, lambda: False):
        shutil.rmtree(output)
        raise WorkError("at its first step")


def test_other_processes_make_no_folder(make_recipe: Callable[..., Path]) -> None:
    """The first may have removed it just now, as it refused the run."""
    recipe = load_recipe(make_recipe())
    with TrainingReport(recipe, [], 0, 12, None, enabled=False):
        assert not recipe.output.exists()


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_narrow_terminal_cuts_no_number(
    make_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for name, value in {"TERM": "xterm", "COLUMNS": str(columns)}.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(make_recipe(name="a run with a long name, of many words"))
    with TrainingReport(recipe, [], 0, 12000, peak=1e9) as report:
        report.step(700, {"loss": 2.345}, 24690, 2.0, flops=9e8)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n")
    assert {"700/12000", "loss", "2.345", "12345", "tokens/s", "45%", "peak"} <= set(shown.split())
