"""Run a command beside two busy loops, without a terminal, in a session of its own that ignores SIGINT.

    python tests/busy.py COMMAND...

The suite must pass so (`make test-busy`): a test that needs idle cores, a terminal or signals fails here.
"""

from __future__ import annotations

import signal
import subprocess
import sys

LOOPS = 2


def main() -> int:
    busy = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(busy, stdin=subprocess.DEVNULL) for _ in range(LOOPS)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the command inherits
    command = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    try:
        assert command.stdout is not None
        for line in command.stdout:  # a pipe, so that neither stream is a terminal
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        return command.wait()
    finally:
        for process in (*loops, command):
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
