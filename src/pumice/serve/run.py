"""Run the application: the listening socket, worker processes, signals and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import Config

from pumice.errors import InputError, WorkError
from pumice.serve.backend import Backend
from pumice.serve.guard import Gate
from pumice.serve.logs import request_line
from pumice.serve.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

KEEP_ALIVE = 75  # seconds that an idle connection stays open
SHUTDOWN_GRACE = 5  # seconds for requests that still run when the time of the drain is over
EARLY_EXIT = 10.0  # seconds; a worker that ends sooner counts as failed to start
_LOG = logging.getLogger("pumice.serve")


@dataclass(frozen=True)
class ServerPlan:
    """How to serve. Every worker calls `backend` and `log` itself, so both must be picklable.

    backend: makes the backend, and says how many requests it answers at a time. log: sets up logging.
    """

    settings: ServerSettings
    backend: Callable[[ServerSettings], tuple[Backend, int]]
    name: str
    log: Callable[[], None]
    workers: int = 1


def serve(plan: ServerPlan) -> None:
    """Serve until a signal ends it. Raises InputError for wrong settings or a taken port, or WorkError."""
    plan.settings.check()
    listener = bind(plan.settings)
    with listener:
        plan.log()
        if plan.workers == 1:
            work(plan, listener)
        else:
            _supervise(plan, listener)


def work(plan: ServerPlan, listener: socket.socket) -> None:
    """Run one worker: open the model, serve until a signal, and answer the requests in flight."""
    from pumice import __version__
    from pumice.serve.app import build
    from pumice.serve.metrics import Metrics

    settings = plan.settings
    backend, slots = plan.backend(settings)
    gate = Gate(slots + settings.queue)
    metrics = Metrics(__version__, plan.name)
    app = build(settings, backend, metrics, gate)
    server = Server(config(app, settings), settings, gate, plan.name)
    gate.connections = lambda: len(server.server_state.connections)
    server.run(sockets=[listener])
    if not server.started:
        raise WorkError("the server did not start; its log says why")


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
    listener.set_inheritable(True)
    return listener


def _supervise(plan: ServerPlan, listener: socket.socket) -> None:
    """Run the workers, each a process that accepts from the same socket, and replace those that end."""
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        stopping = True

    def start_worker() -> tuple[BaseProcess, float]:
        process = spawn.Process(target=_worker, args=(plan, listener), daemon=False)
        process.start()
        return process, time.monotonic()

    # 1. Prepare a folder for the shared metrics, and signal handlers that end the loop below.
    with tempfile.TemporaryDirectory(prefix="pumice-metrics-") as folder, contextlib.ExitStack() as cleanup:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        cleanup.callback(os.environ.pop, "PROMETHEUS_MULTIPROC_DIR", None)
        for sig in (signal.SIGTERM, signal.SIGINT):
            cleanup.callback(signal.signal, sig, signal.signal(sig, stop))
        # 2. Replace each worker that ends. Give up after as many failed starts in a row as there are workers.
        workers = [start_worker() for _ in range(plan.workers)]
        failures = 0
        try:
            while not stopping and failures < plan.workers:
                for number, (process, started) in enumerate(workers):
                    process.join(0.2 / plan.workers)
                    if process.is_alive() or stopping:
                        continue
                    early = time.monotonic() - started < EARLY_EXIT
                    failures = failures + 1 if early else 0
                    fields = {"pid": process.pid, "exit": process.exitcode}
                    request_line(logging.ERROR, "worker ended", fields)
                    if failures < plan.workers:
                        workers[number] = start_worker()
        finally:
            # 3. Let the workers drain, then kill those that take too long.
            for process, _ in workers:
                if process.is_alive():
                    process.terminate()  # SIGTERM: it drains
            end = time.monotonic() + plan.settings.drain_timeout + SHUTDOWN_GRACE
            for process, _ in workers:
                process.join(max(0.1, end - time.monotonic()))
                if process.is_alive():
                    process.kill()
    if not stopping:
        raise WorkError("the workers end as soon as they start; the log above says why")


def _worker(plan: ServerPlan, listener: socket.socket) -> None:
    # Ctrl-C reaches the whole process group. The parent handles it and sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    plan.log()
    try:
        work(plan, listener)
    except (InputError, WorkError) as error:
        _LOG.error("%s", error)
        raise SystemExit(1) from None


def _exit_with_parent() -> None:
    """Drain when the parent ends, even if it is killed: nothing else would stop this worker."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
