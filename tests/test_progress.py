"""Progress: a bar on a terminal, and few lines or none in a file."""

from __future__ import annotations

import re
import sys

import pytest

from pumice.progress import ProgressBar


def test_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyboardInterrupt), ProgressBar() as bar:
        bar.show(1, 3, "row")
        bar.show(3, 3, "row")
        bar.show(1, 2, "picture", "none is damaged")
        raise KeyboardInterrupt
    shown = capsys.readouterr().err
    assert shown.endswith("\x1b[?25h")  # the cursor is there again
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()[-2:]]
    assert [line[1:] for line in lines] == [
        ["3/3", "rows", "0:00:00"],
        ["1/2", "pictures", "none", "is", "damaged", "-:--:--"],
    ]


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_terminal_cuts_no_number(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for name, value in {"TERM": "xterm", "COLUMNS": str(columns), "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with ProgressBar() as bar:
        bar.show(1, 1234567, "picture or text of rows", "so far")
        bar.show(1234567, 1234567, "picture or text of rows", "so far")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()
    assert max(map(len, lines)) <= columns
    words = " ".join(lines).split()
    assert {"1234567/1234567", "0:00:00", "pictures", "so", "far"} <= set(words)
    assert "…" not in "".join(words)


def test_on_a_terminal_that_cannot_redraw(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    for transient, lines in ((False, ["1 of 3 rows", "3 of 3 rows"]), (True, [])):
        with ProgressBar(transient=transient) as bar:
            for done in (1, 2, 3):
                bar.show(done, 3, "row")
        assert capsys.readouterr().err.splitlines() == lines


FIRST, SECOND, LAST = "1 of 2,000", "2 of 2,000 rows", "3 of 2,000 rows, all well"


@pytest.mark.parametrize(
    ("log_seconds", "lines"),
    [(None, []), (3600.0, [FIRST, LAST]), (0.0, [FIRST, SECOND, LAST])],
)
def test_elsewhere(log_seconds: float | None, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(log_seconds=log_seconds) as bar:
        bar.show(1, 2000)
        bar.show(2, 2000, "row")
        bar.show(3, 2000, "row", "all well")
    assert capsys.readouterr().err.splitlines() == lines


def test_one_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(log_seconds=0.0) as bar:
        bar.show(1, 1, "answer")
        bar.show(1, 1, "matrix quantised to int8")
        bar.show(1, 2, "matrix quantised to int8")
    lines = ["1 of 1 answer", "1 of 1 matrix quantised to int8", "1 of 2 matrices quantised to int8"]
    assert capsys.readouterr().err.splitlines() == lines
