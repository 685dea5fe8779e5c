"""Run the application: the listening socket, signals and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.config import Config

from pumice.errors import InputError
from pumice.serve.connection import LimitedProtocol
from pumice.serve.guard import Gate
from pumice.serve.logs import request_line
from pumice.serve.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from pumice.assistant import Assistant

KEEP_ALIVE = 75  # seconds that an idle connection stays open
UNREAD_SECONDS = 60  # that a connection stays open whose client takes nothing of its answers
# After the time of the drain. The sum is less than the 5 s in which the process has to end.
SEND_SECONDS = 1.5  # for clients to take the error that ends their request
ACCEPT_SECONDS = 0.3  # for clients that connect now
BACKLOG_SECONDS = 0.5  # for connections that the system has made and the server has not seen yet
ARRIVE_SECONDS = 1.0  # for the first requests of new connections, and for clients to read the last answers
EXIT_SECONDS = 4.5  # then the process ends, whatever runs


def make_server(
    assistant: Assistant, names: tuple[str, ...], settings: ServerSettings, *, is_built_in: bool = False
) -> Server:
    """Return a server of this assistant's model.

    names: those of the model, the default one first. is_built_in: it is the one that comes with Pumice.
    """
    from pumice import __version__
    from pumice.serve.app import build
    from pumice.serve.backend import Backend
    from pumice.serve.metrics import Metrics

    context, cells = assistant.model.config.decoder.context, assistant.engine.cache_tokens
    if settings.cache_tokens is not None and cells < context:
        fields = {"cache_tokens": cells, "context": context}
        request_line(
            logging.WARNING, "--cache-tokens is less than the model's context: it is the limit", fields
        )
    gate = Gate(assistant.engine.slots, settings.queue)
    metrics = Metrics(__version__, names[0], assistant.engine.stats)
    app = build(settings, Backend(assistant, names, settings, metrics), gate, is_built_in)
    server = Server(config(app, settings), settings, gate, names[0])
    gate.connections = lambda: len(server.server_state.connections)
    return server


def config(app: Starlette, settings: ServerSettings) -> Config:
    return Config(
        app,
        http=type("Protocol", (LimitedProtocol,), {"seconds": settings.body_timeout}),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )


class Server(uvicorn.Server):
    """uvicorn's server with a drain: after a signal, new requests get 503 until the last answer is sent."""

    def __init__(self, config: Config, settings: ServerSettings, gate: Gate, name: str) -> None:
        super().__init__(config)
        self._settings, self._gate, self._name = settings, gate, name
        self._drain_ends = math.inf  # time.monotonic()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            fields = {"model": self._name, "url": f"http://{shown}:{port}", "pid": os.getpid()}
            request_line(logging.INFO, "listening", fields)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # 1. End the requests that are left: an error goes to each client. Who comes now gets one, too.
        self._gate.end()
        begun = time.monotonic()
        await self._wait(lambda: self._gate.in_flight == 0, SEND_SECONDS)
        await self._wait(lambda: False, begun + ACCEPT_SECONDS - time.monotonic())
        await self._stop_listening(sockets or [])
        await self._wait(lambda: not self._is_awaited(), ARRIVE_SECONDS)
        # 2. Cut off clients that do not read what is sent.
        for connection in list(self.server_state.connections):
            if isinstance(connection, LimitedProtocol):
                connection.cut_off()
        # 3. Close the other connections, then the engine.
        await super().shutdown(sockets)
        self._log_stopped()

    async def _stop_listening(self, listeners: list[socket.socket]) -> None:
        """Close the listeners, once nobody waits there: the system would reset who is not accepted."""
        for listener in listeners:
            with contextlib.suppress(OSError):
                listener.listen(0)  # from now on the system queues hardly any connection

        def nobody_waits() -> bool:
            return not any(select.select([listener], [], [], 0)[0] for listener in listeners)

        await self._wait(nobody_waits, BACKLOG_SECONDS)
        for server in self.servers:
            server.close()

    def _is_awaited(self) -> bool:
        """Return whether a connection has not brought its first request, or an answer is being sent."""
        return any(
            isinstance(one, LimitedProtocol) and (one.cycle is None or one.is_sending)
            for one in self.server_state.connections
        )

    @staticmethod
    async def _wait(until: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def _log_stopped(self) -> None:
        request_line(logging.INFO, "stopped", {"model": self._name, "pid": os.getpid()})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:  # the second signal: wait no longer
            self._drain_ends = time.monotonic()
            return
        self._gate.draining = True
        self._drain_ends = time.monotonic() + self._settings.drain_timeout
        threading.Thread(target=self._exit_in_time, name="pumice-exit", daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining and (self._gate.in_flight == 0 or time.monotonic() > self._drain_ends):
            self.should_exit = True
        return await super().on_tick(counter)

    def _exit_in_time(self) -> None:
        """End the process some seconds after the drain, also while threads run that nothing can stop."""
        while time.monotonic() < self._drain_ends + EXIT_SECONDS:
            time.sleep(0.05)
        self._log_stopped()
        logging.shutdown()
        os._exit(0)


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
        if sys.platform == "linux":  # each connection takes it over
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --port"
        ) from error
    listener.setblocking(False)
    return listener
