"""The interface of a backend, which makes the answers, and work that ends when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pumice.serve.metrics import BackendStats, Metrics
from pumice.serve.observe import RequestRecord, request_record

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request to answer, with its complete body."""

    request: Request
    body: bytes

    @property
    def record(self) -> RequestRecord:
        return request_record(self.request)


class Backend(Protocol):
    """Makes answers. Wrong input raises ApiError before the first byte of an answer."""

    async def start(self, metrics: Metrics) -> None: ...

    async def close(self) -> None: ...

    async def models(self) -> list[str]:
        """Return the names that a request may use. The first is the default."""
        ...

    async def chat(self, call: Call) -> Response: ...

    async def complete(self, call: Call) -> Response: ...

    async def explain(self, call: Call) -> Response: ...

    async def ready(self) -> bool: ...

    def stats(self) -> BackendStats: ...


async def run_while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If the client disconnects first, cancel it and raise ClientDisconnect."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for future in (task, disconnect):
            future.cancel()
        for future in (task, disconnect):
            with contextlib.suppress(BaseException):
                await future


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
