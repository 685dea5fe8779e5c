"""A status line: one line on a terminal, and few lines or none in a file."""

from __future__ import annotations

import sys

import pytest

from pumice.progress import StatusLine


def test_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = StatusLine()
    line.show("1 of 2")
    line.show("2 of 2")
    line.end()
    assert capsys.readouterr().err == "\r1 of 2\r2 of 2\n"
    slow = StatusLine(3600.0)
    slow.show("1 of 2")
    slow.show("2 of 2")
    slow.end("done")
    assert capsys.readouterr().err == "\r1 of 2\rdone\n"


def test_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (StatusLine(), StatusLine(log_seconds=3600.0)):
        line.show("1 of 2")
        line.show("2 of 2")
        line.end("done")
    assert capsys.readouterr().err == "1 of 2\ndone\n"
