"""Show the progress of long work on stderr."""

from __future__ import annotations

import sys
import time


class StatusLine:
    """One line of progress, which each new text overwrites on a terminal.

    seconds: shortest time between two texts. log_seconds: the same where stderr is not a terminal and each
    text gets its own line; None writes nothing there.
    """

    def __init__(self, seconds: float = 0.0, *, log_seconds: float | None = None) -> None:
        self.on_terminal = sys.stderr.isatty()
        self._seconds = seconds if self.on_terminal else log_seconds
        self._last_time = float("-inf")

    def show(self, text: str) -> None:
        """Write `text` over the previous text, unless the previous one is too recent."""
        if self._seconds is None or time.monotonic() - self._last_time < self._seconds:
            return
        self._last_time = time.monotonic()
        self._write(text, end="" if self.on_terminal else "\n")

    def clear(self) -> None:
        """Remove the line from a terminal, if there is one, so that other text can follow."""
        if self.on_terminal and self._last_time > float("-inf"):
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._last_time = float("-inf")

    def end(self, text: str = "") -> None:
        """Finish the line, with a last text if one is given."""
        if text and self._seconds is not None:
            self._write(text, end="\n")
        elif self.on_terminal:
            print(file=sys.stderr)

    def _write(self, text: str, end: str) -> None:
        start = "\r" if self.on_terminal else ""
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
