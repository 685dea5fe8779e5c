"""JSON that no encoding of a terminal changes. Files that continue are tested with what writes them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pumice
from pumice.errors import CAUSE, InputError
from pumice.jsonl import json_text, print_json, wrong_json
from pumice.serve.logs import JsonFormatter, TextFormatter

VALUES = {"question": "狗 é 😀", "path": "C:\\été\\\u00a0x"}


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "gbk", "ascii", "latin-1", "utf-16", "cp437"])
def test_printed_json_keeps_its_values(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    # As `main` sets it: what the terminal lacks becomes a question mark.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors="replace"))
    print_json(VALUES)
    sys.stdout.flush()
    written = raw.getvalue()
    assert json.loads(written.decode(encoding)) == VALUES
    if encoding not in ("utf-8", "utf-16"):  # a program that expects UTF-8 reads it, too
        assert json.loads(written.decode("utf-8")) == VALUES
    assert ("狗" in written.decode(encoding)) == (encoding == "utf-8")


def test_half_a_surrogate_pair_is_kept() -> None:
    text = json_text({"id": "a\ud83d"})
    assert json.loads(text.encode()) == {"id": "a\ud83d"}


def test_the_lines_of_a_log_keep_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, "cp1252", errors="replace"))
    record = logging.LogRecord("pumice.serve", logging.INFO, "", 0, "listening", None, None)
    record.fields = {"model": "狗"}
    print(JsonFormatter().format(record), file=sys.stderr, flush=True)
    assert json.loads(raw.getvalue())["model"] == "狗"


def test_a_log_for_people_ends_with_the_fields_and_the_trace() -> None:
    record = logging.LogRecord("pumice.serve", logging.INFO, "", 0, "listening", None, None)
    assert re.fullmatch(r"\d\d:\d\d:\d\d listening", TextFormatter().format(record))
    record.fields = {"model": "狗", "pid": 1}
    try:
        raise OSError("no room")
    except OSError:
        record.exc_info = sys.exc_info()
    first, *trace = TextFormatter().format(record).splitlines()
    assert first.endswith(" listening model=狗 pid=1")
    assert (trace[0], trace[-1]) == ("Traceback (most recent call last):", "OSError: no room")


def test_a_command_beside_a_narrow_code_page(tmp_path: Path) -> None:
    rows = tmp_path / "狗.jsonl"
    rows.write_text('{"id": "狗", "conversations": []}\n', encoding="utf-8")
    for encoding in ("cp1252", "gbk", "utf-8"):
        result = subprocess.run(
            [sys.executable, "-m", "pumice", "data", "check", rows.name, "--json"],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert result.returncode == 1
        report = json.loads(result.stdout.decode("utf-8"))
        assert "狗.jsonl" in report["problems"][0]["source"] + report["problems"][0]["reason"]


def test_no_command_prints_json_by_itself() -> None:
    folder = Path(pumice.__file__).parent / "cli"
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    assert sum("print_json(" in text for text in texts.values()) == 11
    assert [name for name, text in texts.items() if re.search(r"print\(\s*json\.", text)] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1\n "b": 2}', "line 2, column 2: a comma or a closing bracket is missing"),
        ("{a: 1}", "line 1, column 2: a key in double quotes is missing"),
        ('{"a" 1}', "line 1, column 6: a colon is missing behind a key"),
        ("[1, 'x']", "line 1, column 5: a value is missing"),
        ('["a\tb"]', "line 1, column 4: a text holds a line break or another control character"),
        (r'["C:\dog.png"]', "line 1, column 5: a backslash in a text begins no known character; write two"),
        ('{"a": 1} x', "line 1, column 10: more follows behind the end"),
        ('["a', "line 1, column 2: a text has no closing quote"),
        ('{"a": [1,\n', "line 2, column 1: it ends too early"),
        ("", "line 1, column 1: it ends too early"),
        ("1" * 5000, "a number has too many digits"),
        ("[" * 100_000, "too many brackets stand inside each other"),
        (b'"\xff"', "it is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_json_is_told_in_plain_words(text: str | bytes, fault: str) -> None:
    with pytest.raises(InputError) as caught, wrong_json(f"the file: {CAUSE}; fix it"):
        json.loads(text)
    assert str(caught.value) == f"the file: {fault}; fix it"


def test_a_row_has_one_number() -> None:
    """Its own, so its lines are not told beside it."""
    for text, fault in (("[1 2]", "column 4: a comma"), ("[1\n2]", "a comma")):
        with pytest.raises(InputError) as caught, wrong_json(f"row 7: {CAUSE}", one_row=True):
            json.loads(text)
        assert str(caught.value) == f"row 7: {fault} or a closing bracket is missing"
