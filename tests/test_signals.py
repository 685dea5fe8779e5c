"""The tests hear an interrupt and know no terminal, whoever started them: nohup, `&`, a narrow window."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def test_sigint_is_heard_here_and_in_a_process() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    code = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_terminal_of_whoever_started_them_is_not_seen() -> None:
    test = f"{__file__}::{test_no_width_or_colour_is_asked_for.__name__}"
    environment = {"COLUMNS": "40", "TERM": "dumb", "FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout


def test_no_width_or_colour_is_asked_for() -> None:
    code = "import shutil, sys; print(shutil.get_terminal_size().columns, sys.stdout.encoding)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    columns, encoding = shown.split()
    assert columns == "80" and encoding != "ascii"


def test_where_it_is_ignored() -> None:
    test = f"{__file__}::{test_sigint_is_heard_here_and_in_a_process.__name__}"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    process = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *pytest], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout
