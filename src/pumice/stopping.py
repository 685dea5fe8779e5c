"""How work ends that takes too long.

In a thread it asks between its steps whether it shall stop, as when nobody waits for it any more. In a
process of its own, the system ends it at a bound of time or memory. A signal lets a run finish its step.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import IO, Any

_STOP: ContextVar[threading.Event | None] = ContextVar("pumice_stop", default=None)
_PAUSE = 0.1  # seconds between two looks whether anybody still waits for a process


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


@contextlib.contextmanager
def at_signal(act: Callable[[int], object] | None = None) -> Iterator[None]:
    """Call `act` with the number of the first SIGINT or SIGTERM; the second one raises KeyboardInterrupt.

    Without `act`, the first one does so. A signal that the process ignores, as behind `&` in a script, stays
    ignored. In other threads than the main one, which alone may handle signals, nothing changes.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        if received or act is None:
            raise KeyboardInterrupt
        received.append(number)
        act(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for handled, handler in before.items():
            signal.signal(handled, handler)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the end of the context, for work that must not be done in part.

    It must be short. In other threads than the main one, which alone handles signals, nothing changes.
    """
    received: list[int] = []
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(handler := signal.getsignal(number)):
                    before[number] = handler
                    signal.signal(number, lambda number, _: received.append(number))
        yield
    finally:
        for handled, handler in before.items():
            signal.signal(handled, handler)
        for waited in received:
            signal.raise_signal(waited)


def limit_process(cpu_seconds: int, memory: int) -> None:
    """Bound this process's CPU time, and its address space in bytes, where the system can."""
    if sys.platform == "win32":
        return
    import resource

    for kind, limit in ((resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_AS, memory)):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError):  # as for memory on macOS
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def run_bounded(module: str, request: Any, seconds: float) -> tuple[bytes, bool]:
    """Run `python -m module`, which reads `request` as JSON from standard input and calls `limit_process`.

    Returns what it writes, and whether it came to its end within `seconds`. Raises Stopped when the work is
    stopped, which ends the process as well.
    """
    end, data = time.monotonic() + seconds, json.dumps(request).encode()
    command = [sys.executable, "-m", module]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        # A thread sends the request: after its timeout, `communicate` would not send what is left of it.
        pipe, process.stdin = process.stdin, None
        try:
            threading.Thread(target=_send, args=(pipe, data)).start()
            while True:
                try:
                    output, _ = process.communicate(timeout=_PAUSE)
                    return output, process.returncode == 0
                except subprocess.TimeoutExpired:
                    check_stopped()
                    if time.monotonic() > end:
                        process.kill()
        finally:
            process.kill()


def _send(pipe: IO[bytes], data: bytes) -> None:
    """Write into a process and close the pipe. That the process ended before is no error."""
    with contextlib.suppress(OSError), pipe:
        pipe.write(data)
