"""Long work asks between its steps whether it shall stop, as when nobody waits for it any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

_STOP: ContextVar[threading.Event | None] = ContextVar("pumice_stop", default=None)


class Stopped(Exception):
    """The work was stopped from outside."""


@contextlib.contextmanager
def stoppable(stop: threading.Event) -> Iterator[None]:
    """Within the context and this thread, `check_stopped` raises once `stop` is set."""
    token = _STOP.set(stop)
    try:
        yield
    finally:
        _STOP.reset(token)


def check_stopped() -> None:
    """Raise Stopped if the work was stopped. Outside of `stoppable` this does nothing."""
    stop = _STOP.get()
    if stop is not None and stop.is_set():
        raise Stopped
