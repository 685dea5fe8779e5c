"""Threads for work that would block the event loop, and the memory that requests in flight may take.

Work of one kind has threads of its own, so that short work never waits for long work. Whoever stops waiting,
because of the time limit or because the client left, stops the work at its next step.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from pumice.kernels.allocator import return_freed_memory
from pumice.serve.errors import ApiError, busy, is_stopping
from pumice.stopping import Stopped, stoppable

T = TypeVar("T")

# parse: JSON. short: prompts without much text or large pictures. long: all others; each thread may hold a
# decoded picture. schemas, videos: each waits for a process. explain: an explanation takes the most memory.
Kind = Literal["parse", "short", "long", "schemas", "videos", "explain"]
THREADS: dict[Kind, int] = {"parse": 2, "short": 2, "long": 2, "schemas": 4, "videos": 1, "explain": 1}

LARGE = 16 << 20  # bytes of a request, after which freed memory goes back to the system
REQUEST_MEMORY = 1 << 30  # bytes, for all requests in flight together
BODY_COPIES = 3  # of a body, at most: as bytes, as text, and as the pictures in it

SHORT_TEXT = 1 << 15  # characters of a request
SHORT_PIXELS = 4_000_000  # of all its pictures


def kind_of(characters: int, pixels: int = 0) -> Kind:
    """Return where the prompt of so much text and so large pictures is prepared."""
    return "short" if characters <= SHORT_TEXT and pixels <= SHORT_PIXELS else "long"


class Workers:
    """Threads for each kind of work."""

    def __init__(self) -> None:
        self._pools = {
            kind: ThreadPoolExecutor(count, thread_name_prefix=f"pumice-{kind}")
            for kind, count in THREADS.items()
        }
        self._stops: set[threading.Event] = set()

    async def run(self, kind: Kind, work: Callable[..., T], *arguments: object) -> T:
        """Return what `work` returns. If this is cancelled, work that has not begun never does."""
        stop = threading.Event()
        self._stops.add(stop)
        call = functools.partial(_call, kind, stop, work, *arguments)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pools[kind], call)
        except Stopped:
            raise is_stopping() from None
        finally:
            stop.set()
            self._stops.discard(stop)

    def close(self) -> None:
        """Stop all work; do not wait for it."""
        for stop in tuple(self._stops):
            stop.set()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


def _call(kind: Kind, stop: threading.Event, work: Callable[..., T], *arguments: object) -> T:
    try:
        with stoppable(stop):
            return work(*arguments)
    finally:
        if kind in ("long", "explain"):
            return_freed_memory()  # the C library would keep some 100 MB for each thread


@dataclass
class Memory:
    """The bytes that requests in flight may take together, beside the model and the engine's cache."""

    limit: int
    taken: int = 0
    retry_after: Callable[[], int] = lambda: 1  # seconds


@dataclass
class Account:
    """What one request takes of it."""

    memory: Memory
    taken: int = 0

    def take(self, count: int) -> None:
        """Count so many bytes. Raises ApiError if there is no room: 413 if there never is, else 429."""
        if self.taken + count > self.memory.limit:
            raise ApiError(
                413,
                f"the request would take {(self.taken + count) / 1e6:.1f} MB of memory, at most "
                f"{self.memory.limit / 1e6:.1f} are there; ask for less at once",
                code="request_too_large",
            )
        if self.memory.taken + count > self.memory.limit:
            taken = f"the requests being read take {self.memory.taken >> 20} MB already"
            raise busy(taken, self.memory.retry_after())
        self.taken += count
        self.memory.taken += count

    def close(self) -> None:
        """Give everything back."""
        self.memory.taken -= self.taken
        if self.taken > LARGE:
            threading.Thread(target=return_freed_memory, name="pumice-freed", daemon=True).start()
        self.taken = 0
