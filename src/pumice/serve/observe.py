"""The outermost middleware: gives each request an id, a log line and metrics, and answers uncaught errors.

It is pure ASGI, so it does not buffer streams.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pumice.errors import WorkError, cut
from pumice.serve.errors import ApiError
from pumice.serve.logs import request_line
from pumice.serve.metrics import Metrics
from pumice.serve.work import Account, Memory

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass
class RequestRecord:
    """What the server records about one request. `fields` go to its log line."""

    id: str
    started: float = field(default_factory=time.perf_counter)
    fields: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None  # its trace goes to the log
    memory: Account = field(default_factory=lambda: Account(Memory(0)))
    key: bytes = b""  # digest of the client's API key; empty where the server has none
    stop: Callable[[], None] = lambda: None  # ends the request in the way that its state asks for

    def add_error(self, error: ApiError) -> None:
        """Add the error that the client gets to the log line."""
        self.fields |= {"error": error.message, "param": error.param, "code": error.code}

    def end(self) -> None:
        """End the request, because the server stops."""
        self.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.started


def request_record(request: Request) -> RequestRecord:
    record = request.scope["pumice"]
    assert isinstance(record, RequestRecord)
    return record


class Observe:
    """Gives every request an id and one log line. A valid X-Request-Id of the client becomes the id."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client_id = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        record = RequestRecord(client_id if _ID.fullmatch(client_id) else f"req-{secrets.token_hex(8)}")
        scope["pumice"] = record
        status, ended = 0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.id
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        self.metrics.open.inc()
        try:
            with contextlib.suppress(ClientDisconnect):  # there is no client left to answer
                await self.app(scope, receive, send_with_headers)
        except Exception as error:
            record.error = error
            if not status:
                api_error = internal_error(record)
                record.add_error(api_error)
                await api_error.response(scope["path"])(scope, receive, send_with_headers)
        finally:
            self.metrics.open.dec()
            self._close(scope, record, status, ended)

    def _close(self, scope: Scope, record: RequestRecord, status: int, ended: bool) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        outcome = str(status) if ended else "gone"  # the client disconnected before the end
        self.metrics.requests.labels(path, outcome).inc()
        self.metrics.seconds.labels(path).observe(record.seconds)
        client = scope.get("client")
        fields = {
            "request_id": record.id,
            "method": scope["method"],
            "path": cut(scope["path"]),
            "status": status,
            "seconds": round(record.seconds, 4),
            "client": client[0] if client else None,
            **record.fields,
        }
        if not ended:
            fields["gone"] = True
        level = logging.ERROR if record.error is not None else logging.INFO
        is_probe = path in ("/health", "/metrics") and status == 200
        request_line(logging.DEBUG if is_probe else level, "request", fields, record.error)


def internal_error(record: RequestRecord) -> ApiError:
    """Return the error for an uncaught exception. It names the request id, and nothing of the exception.

    A WorkError is a sentence for users.
    """
    if isinstance(record.error, WorkError):
        return ApiError(500, str(record.error), code="internal_error")
    return ApiError(
        500, f"the server failed; its log says why under the request id {record.id}", code="internal_error"
    )
