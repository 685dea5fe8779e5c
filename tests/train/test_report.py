"""What a run shows while it trains."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pumice.train.recipe import load_recipe
from pumice.train.report import TrainingReport, time_left


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
