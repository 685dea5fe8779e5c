"""The tests hear an interrupt though whoever started them ignores it, as nohup and `&` do."""

from __future__ import annotations

import signal
import subprocess
import sys


def test_sigint_is_heard_here_and_in_a_process() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    code = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_it_is_ignored() -> None:
    test = f"{__file__}::{test_sigint_is_heard_here_and_in_a_process.__name__}"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    process = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *pytest], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout
