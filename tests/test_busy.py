"""`make test-busy` runs its command without a terminal, with SIGINT ignored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BUSY = Path(__file__).with_name("busy.py")
SEEN = """
import os, signal, sys
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, os.getsid(0) == os.getpid())
print(sys.stdin.isatty(), sys.stdout.isatty())
sys.exit(3)
"""


def test_the_command_s_surroundings() -> None:
    done = subprocess.run(
        [sys.executable, BUSY, sys.executable, "-c", SEEN], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (3, ["True", "True", "False", "False"])
    assert not done.stderr
