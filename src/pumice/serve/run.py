"""Running the application: sockets, workers, signals, and the drain.

Knows uvicorn and processes. Does not know what is asked and answered.
"""

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
LAST_WORDS = 5  # seconds for what still runs when the drain's time is over
EARLY = 10.0  # seconds: a worker that ends before that has failed to start
_LOG = logging.getLogger("pumice.serve")


@dataclass(frozen=True)
class ServerPlan:
    """How to serve: `backend` makes the answers, in each worker anew, so it must be picklable."""

    settings: ServerSettings
    backend: Callable[[ServerSettings], tuple[Backend, int]]  # and how many requests it answers at a time
    name: str
    log: Callable[[], None]  # sets up logging, in each worker anew
    workers: int = 1


def serve(plan: ServerPlan) -> None:
    """Serve until a signal says to stop. Raises InputError, WorkError, or OSError where the port is taken."""
    plan.settings.check()
    bound = bind(plan.settings)
    with bound:
        plan.log()
        if plan.workers == 1:
            work(plan, bound)
        else:
            _supervise(plan, bound)


def work(plan: ServerPlan, bound: socket.socket) -> None:
    """One worker: open the model, serve until told to stop, answer what is in flight, leave."""
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
    server.run(sockets=[bound])
    if not server.started:
        raise WorkError("the server did not start; its log says why")


def config(app: Starlette, settings: ServerSettings) -> Config:
    return Config(
        app,
        http=_patient(settings.body_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_WORDS,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which after a signal goes on listening to say 503 until the last answer is out."""

    def __init__(self, config: Config, settings: ServerSettings, gate: Gate, name: str) -> None:
        super().__init__(config)
        self._settings, self._gate, self._name = settings, gate, name
        self._told = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            fields = {"model": self._name, "url": f"http://{shown}:{port}", "pid": os.getpid()}
            request_line(logging.INFO, "listening", fields)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:  # told twice: leave at once
            self.should_exit = self.force_exit = True
            return
        self._gate.draining = True
        self._told = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining:
            over = time.monotonic() - self._told > self._settings.drain_timeout
            if self._gate.inside == 0 or over:
                self.should_exit = True
        return await super().on_tick(counter)


def _patient(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which waits only so long for a request's headers."""
    try:
        fast = importlib.import_module("uvicorn.protocols.http.httptools_impl")
    except ImportError:  # httptools is not there for every platform
        base: Any = importlib.import_module("uvicorn.protocols.http.h11_impl").H11Protocol
    else:
        base = fast.HttpToolsProtocol

    class Patient(base):  # either of the two has these methods and attributes
        _alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._wait()
            else:
                self._rest()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._alarm is None:
                self._alarm = self.loop.call_later(seconds, self.transport.close)

        def _rest(self) -> None:
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None

    return Patient


def bind(settings: ServerSettings) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise InputError(
            f"the host {settings.host!r} is no address of this machine ({error.strerror})"
        ) from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --port"
        ) from error
    bound.setblocking(False)
    bound.set_inheritable(True)
    return bound


def _supervise(plan: ServerPlan, bound: socket.socket) -> None:
    """Keep the workers running, each a process that accepts from the same socket."""
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        stopping = True

    def begin() -> tuple[BaseProcess, float]:
        process = spawn.Process(target=_worker, args=(plan, bound), daemon=False)
        process.start()
        return process, time.monotonic()

    with tempfile.TemporaryDirectory(prefix="pumice-metrics-") as folder, contextlib.ExitStack() as undo:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        undo.callback(os.environ.pop, "PROMETHEUS_MULTIPROC_DIR", None)
        for sig in (signal.SIGTERM, signal.SIGINT):
            undo.callback(signal.signal, sig, signal.signal(sig, stop))
        workers = [begin() for _ in range(plan.workers)]
        failures = 0
        try:
            while not stopping and failures < plan.workers:
                for number, (process, begun) in enumerate(workers):
                    process.join(0.2 / plan.workers)
                    if process.is_alive() or stopping:
                        continue
                    early = time.monotonic() - begun < EARLY
                    failures = failures + 1 if early else 0
                    fields = {"pid": process.pid, "exit": process.exitcode}
                    request_line(logging.ERROR, "worker ended", fields)
                    if failures < plan.workers:
                        workers[number] = begin()
        finally:
            for process, _ in workers:
                if process.is_alive():
                    process.terminate()  # SIGTERM: it drains
            end = time.monotonic() + plan.settings.drain_timeout + LAST_WORDS
            for process, _ in workers:
                process.join(max(0.1, end - time.monotonic()))
                if process.is_alive():
                    process.kill()
    if not stopping:
        raise WorkError("the workers end as soon as they start; the log above says why")


def _worker(plan: ServerPlan, bound: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells us
    threading.Thread(target=_follow, daemon=True).start()
    plan.log()
    try:
        work(plan, bound)
    except (InputError, WorkError) as error:
        _LOG.error("%s", error)
        raise SystemExit(1) from None


def _follow() -> None:
    """Drain and leave when the parent is gone, even killed: nobody would stop this worker else."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
