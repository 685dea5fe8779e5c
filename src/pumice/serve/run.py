"""Run the application: the listening socket, signals and the drain."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import Config

from pumice.errors import InputError
from pumice.serve.guard import Gate
from pumice.serve.logs import request_line
from pumice.serve.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from pumice.assistant import Assistant

KEEP_ALIVE = 75  # seconds that an idle connection stays open
SHUTDOWN_GRACE = 5  # seconds for requests that still run when the time of the drain is over


def make_server(assistant: Assistant, names: tuple[str, ...], settings: ServerSettings) -> Server:
    """Return a server of this assistant's model. names: those of the model, the default one first."""
    from pumice import __version__
    from pumice.serve.app import build
    from pumice.serve.backend import Backend
    from pumice.serve.metrics import Metrics

    gate = Gate(assistant.engine.slots, settings.queue)
    metrics = Metrics(__version__, names[0], assistant.engine.stats)
    app = build(settings, Backend(assistant, names, settings, metrics), gate)
    server = Server(config(app, settings), settings, gate, names[0])
    gate.connections = lambda: len(server.server_state.connections)
    return server


def config(app: Starlette, settings: ServerSettings) -> Config:
    return Config(
        app,
        http=_protocol_with_timeout(settings.body_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=SHUTDOWN_GRACE,
    )


class Server(uvicorn.Server):
    """uvicorn's server with a drain: after a signal, new requests get 503 until the last answer is sent."""

    def __init__(self, config: Config, settings: ServerSettings, gate: Gate, name: str) -> None:
        super().__init__(config)
        self._settings, self._gate, self._name = settings, gate, name
        self._drain_started = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            fields = {"model": self._name, "url": f"http://{shown}:{port}", "pid": os.getpid()}
            request_line(logging.INFO, "listening", fields)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        request_line(logging.INFO, "stopped", {"model": self._name, "pid": os.getpid()})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:  # the second signal: leave at once
            self.should_exit = self.force_exit = True
            return
        self._gate.draining = True
        self._drain_started = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining:
            timed_out = time.monotonic() - self._drain_started > self._settings.drain_timeout
            if self._gate.in_flight == 0 or timed_out:
                self.should_exit = True
        return await super().on_tick(counter)


def _protocol_with_timeout(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with a limit, in seconds, on the arrival of a request's headers."""
    try:
        httptools = importlib.import_module("uvicorn.protocols.http.httptools_impl")
    except ImportError:  # httptools is not there for every platform
        base: Any = importlib.import_module("uvicorn.protocols.http.h11_impl").H11Protocol
    else:
        base = httptools.HttpToolsProtocol

    class HeaderTimeoutProtocol(base):  # both protocols have the methods and attributes used here
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._start_timer()
            else:
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.close)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return HeaderTimeoutProtocol


def bind(settings: ServerSettings) -> socket.socket:
    """Return a socket bound to the host and port. Raises InputError when that is not possible."""
    try:
        addresses = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise InputError(
            f"the host {settings.host!r} is no address of this machine ({error.strerror}); change --host"
        ) from error
    family, kind, protocol, _, address = addresses[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --port"
        ) from error
    listener.setblocking(False)
    return listener
