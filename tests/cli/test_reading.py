"""While a long prompt is read, a terminal shows how far it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pumice.assistant import conversation_of, load
from pumice.cli import reading
from pumice.engine.engine import Engine


def test_a_long_prompt_shows_how_far_it_is(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = load(tiny_folder, device="cpu")
    assistant.engine = Engine(assistant.model, chunk=16)
    question = [{"role": "user", "content": "What is this? " * 2}]
    total = len(assistant.prompt(conversation_of(question)).input_ids)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for shortest, shown in ((total + 1, False), (total, True)):
        monkeypatch.setattr(reading, "LONG_PROMPT", shortest)
        assistant.engine.forget()
        text = "".join(reading.pieces(assistant.stream(question, max_new_tokens=4)))
        assert text
        lines = [f"\rreading: {n} of {total} tokens" for n in range(0, total, 16)]
        assert capsys.readouterr().err == ("".join(lines) + "\r\033[K" if shown else "")
    assert len(lines) > 1
