"""Who may ask, and how many at a time: host names, keys, content types, the queue, the drain.

All of it is decided from the headers, before a body is read. Does not know what is asked.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pumice.serve.errors import ApiError
from pumice.serve.observe import record
from pumice.serve.settings import ServerSettings

ANSWERING = frozenset({"/v1/chat/completions", "/v1/completions", "/explain"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass
class Gate:
    """How many requests are being answered, of how many that may be; and whether the server drains."""

    capacity: int
    inside: int = 0
    draining: bool = False
    connections: Callable[[], int] = lambda: 0  # open ones, idle ones as well


class Guard:
    """Lets through what may be answered; everything else gets its error at once."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, gate: Gate) -> None:
        self.app, self.settings, self.gate = app, settings, gate
        self._keys = [_digest(key.encode()) for key in settings.keys]
        # A page on a stranger's host name that resolves to this machine (DNS rebinding) must not ask a
        # server that is meant for this machine alone.
        self._hosts = _LOCAL | set(settings.hosts) if settings.loopback and not settings.keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answering = scope["method"] == "POST" and scope["path"] in ANSWERING
        try:
            self._check_room()
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            if answering:
                self._admit(headers)
        except ApiError as error:
            record(Request(scope)).refuse(error)
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
            return
        self.gate.inside += answering
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.inside -= answering

    def _check_room(self) -> None:
        limit = self.settings.max_connections
        if self.gate.connections() > limit:
            raise ApiError(
                429,
                f"more than {limit} connections are open; ask again soon",
                code="too_many_connections",
                headers={"Retry-After": "1", "Connection": "close"},
            )

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is None:
            return
        host = _host_name(headers.get("host", ""))
        if host in self._hosts or _is_loopback(host):
            return
        raise ApiError(
            421,
            f"this server does not answer to the name {host[:100]!r}; start it with --allow-host or a key",
            code="unknown_host",
        )

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or not (path.startswith("/v1/") or path in ("/explain", "/metrics")):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1", "replace"))
        # All are compared, in constant time each: how long it takes tells nothing.
        right = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            said = "this API key is not known" if key else "an API key is needed"
            raise ApiError(
                401,
                f"{said}; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _admit(self, headers: Headers) -> None:
        if self.gate.draining:
            raise ApiError(
                503,
                "the server is about to stop; ask again soon",
                code="draining",
                headers={"Retry-After": "5"},
            )
        # A page elsewhere can send text/plain here without the browser asking first, but not JSON.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, f"the content type is {kind!r}; send application/json", code="unsupported_media_type"
            )
        if self.gate.inside >= self.gate.capacity:
            raise ApiError(
                429,
                f"{self.gate.inside} requests are being answered or waiting already; ask again soon",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        try:
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise ApiError(400, "the header Content-Length is no number") from None
        if length > self.settings.max_body:
            raise too_large(self.settings.max_body)


def too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the request is larger than {limit} bytes; send fewer or smaller pictures",
        code="request_too_large",
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
