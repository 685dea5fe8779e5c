"""While a long prompt is read, a terminal shows how far it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pumice.assistant import conversation_of, load
from pumice.cli import reading
from pumice.engine.engine import Engine
from pumice.progress import ProgressBar


def test_a_long_prompt_shows_how_far_it_is(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = load(tiny_folder, device="cpu")
    assistant.engine = Engine(assistant.model, chunk=16)
    question = [{"role": "user", "content": "What is this? " * 2}]
    total = len(assistant.prompt(conversation_of(question)).input_ids)
    shown: list[tuple[int, int, str]] = []
    monkeypatch.setattr(ProgressBar, "show", lambda self, *what: shown.append(what))
    for shortest, is_long in ((total + 1, False), (total, True)):
        monkeypatch.setattr(reading, "LONG_PROMPT", shortest)
        assistant.engine.forget()
        text = "".join(reading.pieces(assistant.stream(question, max_new_tokens=4)))
        assert text
        steps = [(n, total, "token read") for n in range(0, total, 16)]
        assert shown == (steps if is_long else [])
    assert len(steps) > 1


def test_the_bar_goes_when_the_answer_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar(transient=True) as bar:
        bar.show(5, 10, "token read")
    assert "tokens read" in capsys.readouterr().err
