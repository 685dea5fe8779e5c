"""Show the progress of long work on stderr: a bar on a terminal, few lines or none elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from pumice.errors import plural

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LOG_SECONDS = 10.0  # between two lines in a file, for work that a person waits for


def can_redraw() -> bool:
    """Return whether stderr is a terminal that can draw a line anew, as a bar needs it."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class ProgressBar:
    """A bar with counts and the time that is left. Close it, as a `with` statement does.

    log_seconds: where a bar cannot be drawn, the time between two lines, and there is a last line at the
    end; None writes nothing there. transient: remove the bar when it is closed.
    """

    def __init__(self, *, log_seconds: float | None = None, transient: bool = False) -> None:
        self._transient = transient
        if log_seconds is None and not transient and sys.stderr.isatty() and not can_redraw():
            log_seconds = LOG_SECONDS  # a person looks on
        self._log_seconds, self._logged, self._line = log_seconds, float("-inf"), ""
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave what is shown as it is; a later `show` begins anew."""
        if self._bar is not None:
            self._bar.stop()
        elif self._log_seconds is not None and self._line:
            print(self._line, file=sys.stderr, flush=True)
        self._bar, self._tasks, self._line = None, {}, ""

    def show(self, done: int, total: int, unit: str = "", text: str = "") -> None:
        """Show that `done` of `total` are done. A new unit gets its own bar. text: what else to say.

        unit: one of them, such as "row"; more words may follow, such as "token read".
        """
        if can_redraw():
            self._draw(done, total, unit, text)
            return
        self._line = f"{done:,} of {total:,} {_named(unit, total)}".rstrip() + (f", {text}" if text else "")
        if self._log_seconds is not None and time.monotonic() - self._logged >= self._log_seconds:
            self._logged = time.monotonic()
            print(self._line, file=sys.stderr, flush=True)
            self._line = ""

    def _draw(self, done: int, total: int, unit: str, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            console = Console(stderr=True)
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))
            left = TimeRemainingColumn(table_column=Column(no_wrap=True))
            # On a narrow terminal the text takes several lines; on a very narrow one there is no bar.
            text_column = TextColumn("{task.description}", table_column=Column(no_wrap=console.width >= 80))
            numbers = (count, text_column, left)
            columns = (BarColumn(), *numbers) if console.width >= 60 else numbers
            self._bar = Progress(*columns, console=console, transient=self._transient)
            self._bar.start()
        if unit not in self._tasks:  # what an earlier run has done took no time
            self._tasks[unit] = self._bar.add_task(unit, completed=max(0, done - 1), total=total)
        description = f"{_named(unit, total)} {text}".strip()
        self._bar.update(self._tasks[unit], completed=done, total=total, description=description)


def _named(unit: str, total: int) -> str:
    """Return a unit as it stands behind a number: its first word changes."""
    noun, *more = unit.split(" ", 1)
    return " ".join([plural(noun, total) if noun else "", *more])
