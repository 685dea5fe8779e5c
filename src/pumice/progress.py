"""How far long work is, told on stderr."""

from __future__ import annotations

import sys


class StatusLine:
    """One line that is written over again and again, where a person watches; nothing elsewhere."""

    def __init__(self) -> None:
        self.watched = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Put `text` in place of what stood there."""
        if self.watched:
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line as it is."""
        if self.watched:
            print(file=sys.stderr)
