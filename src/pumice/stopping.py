"""How work ends that takes too long.

In a thread it asks between its steps whether it shall stop, as when nobody waits for it any more. In a
process of its own, the system ends it at a bound of time or memory.
"""

from __future__ import annotations

import contextlib
import sys
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


def limit_process(cpu_seconds: int, memory: int) -> None:
    """Bound this process's CPU time, and its address space in bytes, where the system can."""
    if sys.platform == "win32":
        return
    import resource

    for kind, limit in ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, memory)):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError):  # as for memory on macOS
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
