"""A server stops in time and tells everybody so; work stops when nobody waits for it, and delays no other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import HI, ask, picture, post, wait_until
from test_run import posix

from pumice.engine import grammar_check
from pumice.engine.engine import Engine
from pumice.explain.attention import Passages
from pumice.serve import backend, images, run, work
from pumice.serve.anthropic import AnthropicRequest
from pumice.serve.connection import LimitedProtocol
from pumice.serve.ollama import OllamaChatRequest, OllamaGenerateRequest
from pumice.serve.responses import ResponsesRequest
from pumice.serve.settings import ServerSettings
from pumice.serve.work import SHORT_TEXT, THREADS, Workers
from pumice.stopping import Stopped, check_stopped, stoppable

# It takes a minute to compile. Each number makes it another one.
PATTERNS = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]


def hard_schema(number: int) -> dict[str, Any]:
    schema = {"allOf": PATTERNS, "title": str(number)}
    return {"type": "json_schema", "json_schema": {"name": "hard", "schema": schema}}


class Held:
    """Work that waits. entered: it has begun. leave: lets it go on. calls: how often it was called."""

    def __init__(self) -> None:
        self.entered, self.leave, self.calls = threading.Event(), threading.Event(), 0

    def wait(self) -> None:
        self.calls += 1
        self.entered.set()
        assert self.leave.wait(120)


@pytest.fixture
def held_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """The engine computes five steps and waits then."""
    held, step, steps = Held(), Engine.step, 0

    def slow(engine: Engine) -> bool:
        nonlocal steps
        worked = step(engine)
        steps += worked
        if steps > 4:
            held.wait()
        return worked

    monkeypatch.setattr(Engine, "step", slow)
    yield held
    held.leave.set()


@pytest.fixture
def held_explanation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """An explanation waits in its first layer."""
    held, attend = Held(), Passages.__call__

    def slow(passages: Passages, *arguments: Any) -> Any:
        held.wait()
        return attend(passages, *arguments)

    monkeypatch.setattr(Passages, "__call__", slow)
    yield held
    held.leave.set()


def explained(answer: str = "A dog.") -> dict[str, Any]:
    return {"messages": [*ask("What?", picture())["messages"], {"role": "assistant", "content": answer}]}


def send(url: str, body: Any, path: str = "/v1/chat/completions", part: int | None = None) -> socket.socket:
    """Send a request, or the first `part` bytes of its body, and return the connection."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data[:part])
    connection.settimeout(60)
    return connection


def read(connection: socket.socket) -> str:
    """Return all that comes until the server closes the connection."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return data.decode()


def started(
    tiny_folder: Path, cache_tokens: int = 256, chunk: int = 512
) -> tuple[run.Server, socket.socket, threading.Thread]:
    """Return a server in a thread of this process, and its listening socket."""
    from pumice.assistant import load

    assistant = load(
        tiny_folder, device="cpu", quantize=None, slots=1, cache_tokens=cache_tokens, chunk=chunk
    )
    settings = ServerSettings(port=0).check()
    server, listener = run.make_server(assistant, ("tiny",), settings), run.bind(settings)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    return server, listener, thread


def test_the_end_of_a_drain(tiny_folder: Path, held_engine: Held, caplog: pytest.LogCaptureFixture) -> None:
    """Streams get an error event, all others 503 in JSON, the log one line each and no trace."""
    caplog.set_level("INFO")
    server, listener, thread = started(tiny_folder, cache_tokens=2048, chunk=64)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    # 1. A stream that has begun, streams and questions that wait, and a body that is still arriving.
    begun = send(url, ask(max_tokens=200, stream=True))
    first = begun.recv(1 << 16).decode()
    assert held_engine.entered.wait(60)
    waiting = [send(url, ask(max_tokens=200, stream=number % 2 == 0)) for number in range(4)]
    waiting.append(send(url, ask(), part=10))
    waiting.append(send(url, {"prompt": "A story", "max_tokens": 200}, "/v1/completions"))
    while server._gate.in_flight < 7:
        assert thread.is_alive()
    # 2. The time of the drain is over.
    server.should_exit = True
    first += read(begun)
    assert first.startswith("HTTP/1.1 200")
    assert '"code":"draining"' in first
    assert "[DONE]" not in first
    for connection in waiting:
        text = read(connection)
        assert text.startswith("HTTP/1.1 503"), text
        assert "content-type: application/json" in text
        assert json.loads(text.partition("\r\n\r\n")[2])["error"]["code"] == "draining"
    thread.join(60)
    assert not thread.is_alive()
    # 3. The log.
    lines = [record.__dict__["fields"] for record in caplog.records if record.message == "request"]
    assert sorted(line["status"] for line in lines) == [200] + [503] * 6
    assert {line["code"] for line in lines} == {"draining"}
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.INFO]


def test_connections_that_nobody_has_accepted_at_the_end(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system has made them while the server was busy. Closing its socket then would reset them."""
    monkeypatch.setattr(run, "ACCEPT_SECONDS", 0)
    server, listener, thread = started(tiny_folder)
    held, end = Held(), server._gate.end

    def slow_end() -> None:
        held.wait()
        end()

    monkeypatch.setattr(server._gate, "end", slow_end)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    assert held.entered.wait(60)
    waiting = [send(url, ask()) for _ in range(5)]
    held.leave.set()
    for connection in waiting:
        assert read(connection).startswith("HTTP/1.1 503")
    thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def unread_answers(server: run.Server, listener: socket.socket, answered: bool) -> Iterator[None]:
    """A client that reads nothing, until no buffer takes more. answered: its last request has an answer."""
    with socket.create_connection(listener.getsockname()[:2]) as connection:
        wait_until(lambda: server.server_state.connections)
        (protocol,) = server.server_state.connections
        assert isinstance(protocol, LimitedProtocol)

        def request() -> None:
            before = protocol.cycle
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: protocol.cycle is not before)

        while not protocol.flow.write_paused:
            request()
            wait_until(lambda: protocol.cycle.response_complete)
        if not answered:
            request()
        assert protocol.cycle.response_complete == answered
        yield


@pytest.mark.parametrize("answered", [True, False])
def test_who_reads_no_answer_is_cut_off_at_the_end(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, answered: bool
) -> None:
    """No task has to be cancelled, which the log would tell."""
    caplog.set_level("INFO")
    server, listener, thread = started(tiny_folder)
    with unread_answers(server, listener, answered):
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.INFO]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the connection")
def test_who_reads_no_answer_for_long_is_cut_off(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "UNREAD_SECONDS", 2)
    server, listener, thread = started(tiny_folder)
    with unread_answers(server, listener, answered=True):
        wait_until(lambda: not server.server_state.connections, 60)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@posix
def test_a_second_signal_ends_the_drain(process: Callable[..., Any]) -> None:
    server = process("--slots", "1", "--drain-timeout", "100000")
    url = server.url
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        body = ask(max_tokens=2000, temperature=1.0, seed=0)
        running = [pool.submit(post, url, {**body, "seed": number}) for number in range(12)]
        while "pumice_running_requests 1.0" not in httpx.get(f"{url}/metrics").text:
            assert not all(future.done() for future in running)
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
        answers = [future.result(120) for future in running]
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert answers[-1].json()["error"]["code"] == "draining"
    assert server.process.wait(60) == 0
    assert [line["message"] for line in server.log()][-1] == "stopped"
    assert not [line for line in server.log() if "trace" in line or line["level"] != "info"]


@posix
def test_the_process_ends_whatever_runs(
    tiny_folder: Path, tmp_path: Path, process: Callable[..., Any]
) -> None:
    """A thread that nothing can stop, as of a library, does not keep the process."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
        "from pumice.cli import app\napp()\n"
    )
    server = process("--drain-timeout", "0.1", program=(str(script),))
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0
    assert server.log()[-1]["message"] == "stopped"


@posix
@pytest.mark.parametrize(
    ("signals", "drain"), [([signal.SIGTERM], "0.1"), ([signal.SIGINT, signal.SIGINT], "100000")]
)
def test_a_stream_of_a_process_that_stops_ends_with_an_error(
    tmp_path: Path, process: Callable[..., Any], signals: list[signal.Signals], drain: str
) -> None:
    script = tmp_path / "serve.py"
    script.write_text(
        "import time\nfrom pumice.engine.engine import Engine\nstep = Engine.step\n"
        "def slow(engine):\n    time.sleep(0.2)\n    return step(engine)\n"
        "Engine.step = slow\nfrom pumice.cli import app\napp()\n"
    )
    server = process("--drain-timeout", drain, program=(str(script),))
    connection = send(server.url, ask(max_tokens=200, stream=True))
    text = connection.recv(1 << 16).decode()
    assert text.startswith("HTTP/1.1 200")
    server.process.send_signal(signals[0])
    for number in signals[1:]:
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        server.process.send_signal(number)
    text += read(connection)
    assert '"code":"draining"' in text and "[DONE]" not in text
    assert server.process.wait(60) == 0
    assert server.log()[-1]["message"] == "stopped"


def test_an_explanation_ends_when_its_client_leaves(local: Any, held_explanation: Held) -> None:
    with local() as url:
        connection = send(url, explained(), "/explain")
        assert held_explanation.entered.wait(60)
        connection.close()
        while "pumice_open_requests 1.0" not in httpx.get(f"{url}/metrics").text:
            pass  # the one that is left is the request for the metrics
        held_explanation.leave.set()
        assert post(url, explained(), "/explain").status_code == 200
        calls = held_explanation.calls
        assert post(url, explained(), "/explain").status_code == 200
    # The first one had no second layer.
    assert held_explanation.calls - calls == calls - 1 > 1


def test_work_has_the_time_of_its_request(local: Any, held_explanation: Held) -> None:
    with local(timeout=1) as url:
        error = post(url, explained(), "/explain").json()["error"]
        assert error["code"] == "timeout"
        # On a busy machine an answer may take longer than this server's second.
        assert any(post(url, ask()).status_code == 200 for _ in range(60))


def test_hard_schemas_delay_nobody(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread for schemas has one, and one more waits for a thread."""
    begun, leave = threading.Semaphore(0), threading.Event()

    def held(grammars: list[str]) -> list[str]:
        begun.release()
        assert leave.wait(120)
        return ["it takes too long"] * len(grammars)

    monkeypatch.setattr(backend, "check_grammars", held)
    count = THREADS["schemas"] + 1
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        hard = [pool.submit(post, server, ask(response_format=hard_schema(n))) for n in range(count)]
        try:
            assert all(begun.acquire(timeout=60) for _ in range(THREADS["schemas"]))
            assert post(server, ask()).status_code == 200
            assert not any(future.done() for future in hard)
        finally:
            leave.set()
        for future in hard:
            assert future.result(120).status_code == 400
            assert future.result().json()["error"]["code"] == "invalid_json_schema"


@posix
def test_a_hard_schema_ends_when_its_client_leaves(
    server: str, monkeypatch: pytest.MonkeyPatch, started: list[Any]
) -> None:
    monkeypatch.setattr(grammar_check, "WALL_SECONDS", 1000)  # on a busy machine it would kill, too
    connection = send(server, ask(response_format=hard_schema(99)))
    wait_until(lambda: bool(started))
    connection.close()
    assert started[0].wait(60) == -signal.SIGKILL  # its own limit of time would be SIGXCPU


def test_long_work_leaves_threads_to_short_work() -> None:
    """All threads for long work are taken; short work goes on. Work that nobody waits for stops."""

    async def main() -> None:
        workers, release, ends = Workers(), threading.Event(), []

        def long() -> None:
            try:
                while not release.is_set():
                    check_stopped()
            except Stopped:
                ends.append("stopped")
                raise

        running = [asyncio.ensure_future(workers.run("long", long)) for _ in range(THREADS["long"] + 1)]
        assert await workers.run("short", lambda: 3) == 3
        assert await workers.run("parse", lambda: 4) == 4
        assert not any(one.done() for one in running)
        for one in running:
            one.cancel()
        await asyncio.wait(running)
        while len(ends) < THREADS["long"]:  # the one that had not begun never does
            await asyncio.sleep(0)
        assert await workers.run("long", lambda: 5) == 5
        assert ends == ["stopped"] * THREADS["long"]
        workers.close()

    asyncio.run(main())


def test_a_search_for_the_damaged_picture_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, opened = threading.Event(), []

    def opening(data: bytes) -> None:
        opened.append(data)
        stop.set()

    monkeypatch.setattr(images, "open_image", opening)
    with stoppable(stop), pytest.raises(Stopped):
        images.find_damaged({"a": b"1", "b": b"2"})
    assert opened == [b"1"]


def test_each_kind_of_work_has_its_threads(roomy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts, many pixels, files whose pixels are known when they are decoded, and long bodies."""
    threads: list[str] = []

    def noted(module: Any, name: str) -> None:
        call = getattr(module, name)

        def noting(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name.rpartition("_")[0])
            return call(*arguments)

        monkeypatch.setattr(module, name, noting)

    def threads_of(body: Any) -> list[str]:
        threads.clear()
        post(roomy, body)
        return threads

    noted(backend.Backend, "_chat_prompt")
    assert threads_of(ask()) == threads_of(ask("What?", picture())) == ["pumice-short"]
    assert threads_of(ask("x" * (SHORT_TEXT + 1))) == ["pumice-long"]
    with monkeypatch.context() as patch:
        patch.setattr(work, "SHORT_PIXELS", 40 * 30 - 1)
        assert threads_of(ask("What?", picture())) == ["pumice-long"]
    noted(images, "_check")
    assert threads_of(ask("What?", picture())) == ["pumice-short"] * 2
    assert threads_of(ask("What?", picture(file_format="TIFF"))) == ["pumice-long", "pumice-short"]
    noted(backend, "parse")
    assert not threads_of(ask())[0].startswith("pumice")
    assert threads_of(ask(metadata={"a": "x" * backend.LONG_BODY}))[0] == "pumice-parse"


def test_a_tool_schema_that_is_too_hard_is_named(roomy: str) -> None:
    easy = {"type": "object", "properties": {"a": {"type": "string"}}}
    hard = {"type": "object", "properties": {"a": {"allOf": PATTERNS}}}
    tools = [
        {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}
        for number, parameters in enumerate([easy, hard, easy])
    ]
    response = post(roomy, ask(tools=tools, tool_choice="required"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools.1.function.parameters"
    assert "more than 2 s" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [
        (ResponsesRequest, "/v1/responses", {"input": "hi"}),
        (AnthropicRequest, "/v1/messages", {"messages": [HI], "max_tokens": 1}),
        (OllamaChatRequest, "/api/chat", {"model": "tiny", "messages": [HI]}),
        (OllamaGenerateRequest, "/api/generate", {"model": "tiny", "prompt": "hi"}),
    ],
)
def test_requests_are_translated_beside_the_event_loop(
    roomy: str, monkeypatch: pytest.MonkeyPatch, kind: Any, path: str, body: dict[str, Any]
) -> None:
    """A conversation of 20,000 parts takes 0.3 s, in which nobody else would be answered."""
    threads: list[str] = []
    translate = kind.chat

    def chat(request: Any) -> Any:
        threads.append(threading.current_thread().name)
        return translate(request)

    monkeypatch.setattr(kind, "chat", chat)
    assert post(roomy, body, path).status_code == 200
    assert [name.startswith("pumice-parse") for name in threads] == [True]
