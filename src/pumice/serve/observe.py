"""Around everything: a request's id, its log line, its counts, and the last resort when code is wrong.

Pure ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pumice.serve.errors import ApiError
from pumice.serve.logs import request_line
from pumice.serve.metrics import Metrics

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass
class Record:
    """What is noted of one request while it runs; `fields` go to the log."""

    id: str
    begun: float = field(default_factory=time.perf_counter)
    fields: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None  # its trace goes to the log

    def refuse(self, error: ApiError) -> None:
        """Note what the client is told."""
        self.fields |= {"error": error.message, "param": error.param, "code": error.code}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun


def record(request: Request) -> Record:
    found = request.scope["pumice"]
    assert isinstance(found, Record)
    return found


class Observe:
    """Gives every request an id (its own X-Request-Id where it has a sound one) and one log line."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        note = Record(given if _ID.fullmatch(given) else f"req-{secrets.token_hex(8)}")
        scope["pumice"] = note
        status, ended = 0, False

        async def send_on(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = note.id
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        self.metrics.opened(1)
        try:
            with contextlib.suppress(ClientDisconnect):  # nobody is left to be told
                await self.app(scope, receive, send_on)
        except Exception as error:
            note.error = error
            if not status:
                told = internal(note)
                note.refuse(told)
                await JSONResponse(told.body(), told.status)(scope, receive, send_on)
        finally:
            self.metrics.opened(-1)
            self._close(scope, note, status, ended)

    def _close(self, scope: Scope, note: Record, status: int, ended: bool) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        told = str(status) if ended else "gone"  # the client went away before the end
        self.metrics.requests.labels(path, told).inc()
        self.metrics.seconds.labels(path).observe(note.seconds)
        client = scope.get("client")
        fields = {
            "request_id": note.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(note.seconds, 4),
            "client": client[0] if client else None,
            **note.fields,
        }
        if not ended:
            fields["gone"] = True
        level = logging.ERROR if note.error is not None else logging.INFO
        quiet = path in ("/health", "/metrics") and status == 200
        request_line(logging.DEBUG if quiet else level, "request", fields, note.error)


def internal(note: Record) -> ApiError:
    """What a client is told of a fault of ours: where to find the trace, nothing else."""
    return ApiError(
        500, f"the server failed; its log says why under the request id {note.id}", code="internal_error"
    )
