"""A real server with a tiny random model, on a real port: in a thread, or as a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pumice.formats.text.chat_template import describe
from pumice.serve.settings import ServerSettings

if TYPE_CHECKING:
    from pumice.assistant import Assistant

sys.path.insert(0, str(Path(__file__).parent))  # for `asking`, which test files import

Serving = Callable[..., AbstractContextManager[str]]


@contextlib.contextmanager
def serving(assistant: Assistant, names: tuple[str, ...], settings: ServerSettings) -> Iterator[str]:
    """Serve in a thread and yield the address."""
    from pumice.serve import run

    server = run.make_server(assistant, names, settings)
    listener = run.bind(settings)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def local(tiny_folder: Path) -> Callable[..., AbstractContextManager[str]]:
    """`with local(**settings) as url`: the tiny model, served."""

    def serve(
        slots: int = 4,
        cache_tokens: int = 2048,
        names: tuple[str, ...] = ("tiny",),
        folder: Path = tiny_folder,
        quantize: Literal["int8", "int4"] | None = None,
        **settings: Any,
    ) -> Any:
        from pumice.assistant import load

        sizes = {"slots": slots, "cache_tokens": cache_tokens, "chunk": 64}
        assistant = load(folder, device="cpu", quantize=quantize, **sizes)
        return serving(assistant, names, ServerSettings(port=0, **settings).check())

    return serve


@pytest.fixture(scope="session")
def server(local: Serving) -> Iterator[str]:
    """One server for all tests that need no special settings."""
    with local() as url:
        yield url


def roomy_folder(tiny_folder: Path, folder: Path, **changes: Any) -> Path:
    """Copy the tiny model with a context that holds the descriptions of tools, and a changed config."""
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["context"] = 4096
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="session")
def roomy(local: Serving, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the tiny model with room for tools."""
    folder = roomy_folder(tiny_folder, tmp_path_factory.mktemp("roomy") / "model")
    with local(folder=folder, cache_tokens=8192) as url:
        yield url


@pytest.fixture(scope="session")
def calling_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that knows functions."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    source = (Path(__file__).parents[1] / "chat_templates" / "qwen2.5.jinja").read_text()
    described = describe(source, bos=None, eos="<|im_end|>", specials=specials)
    assert described.chat is not None
    chat = dataclasses.asdict(described.chat)
    return roomy_folder(tiny_folder, tmp_path_factory.mktemp("calling") / "model", template="own", chat=chat)


@pytest.fixture(scope="session")
def calling(local: Serving, calling_folder: Path) -> Iterator[str]:
    """A server of a model whose chat template knows functions."""
    with local(folder=calling_folder, cache_tokens=8192) as url:
        yield url


class Process:
    """`pumice serve` as a process, with its log lines."""

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "pumice"),
    ) -> None:
        command = [sys.executable, *program, "serve", "--log", "json", *arguments]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.lines: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.other.append(line)

    def wait_for(self, message: str, count: int = 1, seconds: float = 120) -> list[dict[str, Any]]:
        end = time.monotonic() + seconds
        while True:
            lines = [line for line in self.lines if line["message"] == message]
            if len(lines) >= count:
                return lines
            assert self.process.poll() is None, self.other
            assert time.monotonic() < end, self.other
            time.sleep(0.02)

    def log(self) -> list[dict[str, Any]]:
        """All lines of a process that has ended."""
        self._thread.join(60)
        return self.lines

    @property
    def url(self) -> str:
        return str(self.wait_for("listening")[0]["url"])

    @property
    def port(self) -> str:
        return re.sub(r".*:", "", self.url)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def process(tiny_folder: Path) -> Iterator[Callable[..., Process]]:
    """`process(*options)`: `pumice serve` of the tiny model on a free port."""
    processes: list[Process] = []

    def start(*arguments: str, **more: Any) -> Process:
        port = [] if "--port" in arguments else ["--port", "0"]
        processes.append(Process("--model", str(tiny_folder), "--name", "tiny", *port, *arguments, **more))
        return processes[-1]

    yield start
    for started in processes:
        started.end()
