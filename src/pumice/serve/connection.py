"""A connection's limits: the time and size of a request's headers, and the requests that wait behind one."""

from __future__ import annotations

import asyncio
import importlib
import logging
from typing import Any

from pumice.serve.errors import ApiError, invalid
from pumice.serve.logs import request_line

MAX_HEADERS = 1 << 16  # bytes of a request without its body; up to FED more pass
FED = 1 << 14  # bytes that the parser gets at a time
MAX_PIPELINED = 16  # requests that may wait on a connection, behind the one that is answered

_TOO_LARGE = ApiError(
    431, f"the headers are larger than {MAX_HEADERS} bytes; send fewer", code="headers_too_large"
)
_PIPELINED = ApiError(
    429, f"more than {MAX_PIPELINED} requests wait on this connection; read the answers first",
    code="pipeline_full",
)  # fmt: skip
_INVALID = invalid(None, "this is no HTTP/1.1 request; ask with an HTTP client", "invalid_http")

try:
    _base: Any = importlib.import_module("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol
except ImportError:  # httptools is not there for every platform; h11 has limits of its own
    _base = importlib.import_module("uvicorn.protocols.http.h11_impl").H11Protocol
_COUNTS = hasattr(_base, "on_message_begin")


class LimitedProtocol(_base):
    """uvicorn's HTTP protocol. seconds: for the headers of a request to arrive.

    The parser says when headers and chunks begin and end. What arrives between two such events and is no body
    is kept in memory, whether or not it is a header: it is counted here.
    """

    seconds = 30.0
    _timer: asyncio.TimerHandle | None = None
    _kept = 0  # bytes since the last event
    _body = 0  # of the bytes that the parser has now, those of a body
    _events = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), FED):
            if self.transport.is_closing():
                return
            part = data[start : start + FED]
            self._body, self._events = 0, False
            super().data_received(part)
            if _COUNTS:
                self._kept = 0 if self._events else self._kept + len(part) - self._body
            if self._kept > MAX_HEADERS:
                self._refuse(_TOO_LARGE)
                return
            if len(getattr(self, "pipeline", ())) > MAX_PIPELINED:
                self._refuse(_PIPELINED)
                return
        if self.cycle is None or self.cycle.response_complete:
            self._start_timer()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def is_sending(self) -> bool:
        """Whether an answer, or a part of one, is still to be sent."""
        answers = self.cycle is not None and not self.cycle.response_complete
        return answers or self.transport.get_write_buffer_size() > 0

    def cut_off(self) -> None:
        """Drop the connection if an answer is still being sent: its client does not read."""
        if self.is_sending:
            self.transport.abort()

    # What httptools calls.
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._events = True

    def on_headers_complete(self) -> None:
        self._events = True
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._events = True

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._events = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser does not understand, in the form of all other errors."""
        self._refuse(_TOO_LARGE if self._kept > MAX_HEADERS else _INVALID)

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer is being sent, and close the connection."""
        if not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                body = error.body().model_dump_json(exclude_unset=True).encode()
                head = (
                    f"HTTP/1.1 {error.status} Refused\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                self.transport.write(head.encode() + body)
            self.transport.close()
            client = self.client[0] if self.client else None
            fields = {"status": error.status, "client": client, "code": error.code}
            request_line(logging.INFO, "refused", fields)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
