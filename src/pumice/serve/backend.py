"""What the server needs of whoever makes answers, and how it listens for a reader who goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pumice.serve.metrics import Levels, Metrics
from pumice.serve.observe import Record, record

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One question to answer: its whole body, and what it is called in the log."""

    request: Request
    body: bytes

    @property
    def record(self) -> Record:
        return record(self.request)


class Backend(Protocol):
    """Makes answers. Wrong input raises ApiError before the first byte of an answer."""

    async def start(self, metrics: Metrics) -> None: ...

    async def close(self) -> None: ...

    async def models(self) -> list[str]:
        """Names that a request may give, the first is the usual one."""
        ...

    async def chat(self, call: Call) -> Response: ...

    async def complete(self, call: Call) -> Response: ...

    async def explain(self, call: Call) -> Response: ...

    async def ready(self) -> bool: ...

    def levels(self) -> Levels: ...


async def attended(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client goes away first: then it is cancelled, and ClientDisconnect raised."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, watch):
            each.cancel()
        for each in (task, watch):
            with contextlib.suppress(BaseException):
                await each


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
