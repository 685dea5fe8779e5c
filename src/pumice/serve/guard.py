"""Admission: checks host names, keys, content types and limits from the headers, before a body is read."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import anyio
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pumice.errors import counted, shorten
from pumice.serve.errors import ApiError, busy, invalid, is_stopping
from pumice.serve.observe import request_record
from pumice.serve.openapi import OPERATIONS
from pumice.serve.settings import ServerSettings, is_loopback
from pumice.serve.work import BODY_COPIES, REQUEST_MEMORY, Account, Memory

ANSWER_PATHS = frozenset(operation.path for operation in OPERATIONS if operation.request is not None)
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass
class Gate:
    """The number of requests in flight and its limit, and whether the server is draining.

    slots: requests answered at a time. queue: those that may wait beyond them. interval: a running mean of
    the seconds from one answer's end to the next: the time of each request that was answered, shared by all
    that were in flight when it came.
    """

    slots: int
    queue: int
    in_flight: int = 0
    interval: float = 0.1
    draining: bool = False
    connections: Callable[[], int] = lambda: 0  # number of open connections, idle ones included
    ended: bool = False  # whether the time of the drain is over
    _endings: set[Callable[[], None]] = field(default_factory=set)

    def end(self) -> None:
        """End the requests in flight, because the server stops."""
        self.draining = self.ended = True
        for ending in tuple(self._endings):
            ending()

    @contextlib.contextmanager
    def ending(self, act: Callable[[], None]) -> Iterator[None]:
        """Within the context, `end` calls `act`."""
        self._endings.add(act)
        try:
            if self.ended:
                act()
            yield
        finally:
            self._endings.discard(act)

    @contextlib.contextmanager
    def passing(self, was_answered: Callable[[], bool]) -> Iterator[None]:
        """Count a request while it is answered, also if the answer fails."""
        self.in_flight += 1
        started, sharing = time.perf_counter(), self.in_flight
        try:
            yield
        finally:
            self.in_flight -= 1
            if was_answered():  # wrong ones, which take no time, say nothing about the others
                self.interval += 0.1 * ((time.perf_counter() - started) / sharing - self.interval)

    @property
    def full(self) -> bool:
        return self.in_flight >= self.slots + self.queue

    @property
    def retry_after(self) -> int:
        """Seconds until those who wait now have slots."""
        return max(1, math.ceil(max(0, self.in_flight - self.slots) * self.interval))


class Guard:
    """Middleware that lets a request through, or answers it with an error at once."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, gate: Gate) -> None:
        self.app, self.settings, self.gate = app, settings, gate
        limit = max(REQUEST_MEMORY, 2 * BODY_COPIES * settings.body_bytes)
        self._memory = Memory(limit, retry_after=lambda: gate.retry_after)
        self._keys = [_digest(key.encode()) for key in settings.api_key]
        self._max_body = settings.body_bytes
        # DNS rebinding: a foreign web page may give its own host name the address of this machine. A
        # server for this machine alone must not answer such a page.
        self._hosts = (
            _LOCAL | {host.lower() for host in settings.allow_host}
            if settings.loopback and not settings.api_key
            else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # 1. Check the headers. The cheapest check comes first, and no body is read before all of them pass.
        headers, record = Headers(scope=scope), request_record(Request(scope))
        needs_slot = scope["method"] == "POST" and scope["path"] in ANSWER_PATHS
        try:
            self._check_connections()
            self._check_host(headers)
            record.key = self._check_key(scope["path"], headers)
            if needs_slot:
                self._admit(headers)
        except ApiError as error:
            record.add_error(error)
            await error.response(scope["path"])(scope, receive, send)
            return
        # 2. Let it pass.
        if not needs_slot:
            await self.app(scope, receive, send)
            return
        record.memory = Account(self._memory)
        with (
            contextlib.closing(record.memory),
            self.gate.passing(lambda: "completion_tokens" in record.fields),
            anyio.CancelScope() as work,
        ):
            record.stop = work.cancel  # a stream that has begun ends in its own way
            with self.gate.ending(record.end):
                await self.app(scope, receive, send)
        # 3. It was cancelled, because the server stops.
        if work.cancelled_caught:
            stopping = is_stopping()
            record.add_error(stopping)
            await stopping.response(scope["path"])(scope, receive, send)

    def _check_connections(self) -> None:
        limit = self.settings.max_connections
        if self.gate.connections() > limit:
            open_ones = f"more than {counted(limit, 'connection', 'are')} open"
            raise busy(open_ones, 1, "too_many_connections", Connection="close")

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is None:
            return
        host = _host_name(headers.get("host", ""))
        if host in self._hosts or is_loopback(host):
            return
        raise ApiError(
            421,
            f"this server does not answer to the name {host[:100]!r}; start it with --allow-host or a key",
            code="unknown_host",
        )

    def _check_key(self, path: str, headers: Headers) -> bytes:
        """Return the digest of the key; empty where none is needed."""
        if not self._keys or not (
            path.startswith(("/v1/", "/api/")) or path in ("/explain", "/boxes", "/metrics")
        ):
            return b""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not scheme:  # as Anthropic's clients send it
            scheme, key = "bearer", headers.get("x-api-key", "")
        digest = _digest(key.strip().encode("latin-1", "replace"))
        # Compare with every key, each in constant time, so that the duration reveals nothing about a key.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            problem = "this API key is not known" if key else "an API key is needed"
            raise ApiError(
                401,
                f"{problem}; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest

    def _admit(self, headers: Headers) -> None:
        """Raise ApiError unless there is room for this request and its headers are right."""
        if self.gate.draining:
            raise is_stopping()
        # Browsers send other types than JSON to other origins without a CORS preflight, but they send Origin.
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        no_type = not content_type and "origin" not in headers  # as LiteLLM asks Ollama
        if content_type != "application/json" and not no_type:
            raise ApiError(
                415,
                f"the content type is {shorten(content_type)}; send Content-Type: application/json",
                code="unsupported_media_type",
            )
        if self.gate.full:
            waiting = f"{counted(self.gate.in_flight, 'request', 'are')} being answered or waiting already"
            raise busy(waiting, self.gate.retry_after)
        try:
            length = int(headers.get("content-length", "0"))
        except ValueError:
            raise invalid(None, "the header Content-Length is not a number; send the body's bytes") from None
        if length > self._max_body:
            raise too_large(self._max_body)


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
