"""`pumice serve` as a process: signals, workers, an upstream, wrong options."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import ask, post
from typer.testing import CliRunner

from pumice.cli import app

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def stream(url: str, **more: Any) -> tuple[str, bool] | None:
    """(what a stream said, whether it came to its end); None when the server drains already."""
    text, ended = "", False
    body = ask(stream=True, **more)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        if response.status_code == 503:
            return None
        assert response.status_code == 200
        for line in response.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    return text, ended


@posix
def test_a_drain_finishes_what_it_began(process: Callable[..., Any]) -> None:
    server = process("--slots", "1", "--drain-timeout", "110")
    url = server.url
    with concurrent.futures.ThreadPoolExecutor(10) as pool:  # so many that the drain takes a while
        running = [pool.submit(stream, url, max_tokens=2000, temperature=1.0, seed=n) for n in range(10)]
        while "pumice_running_requests 1.0" not in httpx.get(f"{url}/metrics").text:
            assert not all(future.done() for future in running)
        server.process.send_signal(signal.SIGTERM)
        while (response := httpx.get(f"{url}/health")).status_code == 200:
            time.sleep(0.001)
        assert response.json()["status"] == "draining"
        refused = post(url, ask())
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        answers = [future.result(120) for future in running]
    # Whatever had begun came to its end; what came too late was refused.
    assert any(answer is not None for answer in answers)
    assert all(text and ended for text, ended in filter(None, answers))
    assert server.process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@posix
def test_workers_share_a_port_and_are_replaced(process: Callable[..., Any]) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    server = process("--workers", "2")
    first, second = server.wait_for("listening", 2)
    assert first["url"] == second["url"]
    url = first["url"]

    def counted(requests: int) -> None:  # that is done when the answer has gone out
        expected = f'pumice_requests_total{{path="/v1/chat/completions",status="200"}} {requests}.0'
        end = time.monotonic() + 60
        while expected not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < end

    assert post(url, ask()).status_code == 200
    counted(1)  # a worker that is killed before it counts never will
    os.kill(first["pid"], signal.SIGKILL)
    assert len(server.wait_for("listening", 3)) == 3
    assert len({line["pid"] for line in server.lines if line["message"] == "listening"}) == 3
    assert post(url, ask()).status_code == 200
    counted(2)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


@posix
def test_workers_leave_with_their_parent(process: Callable[..., Any]) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    server = process("--workers", "2")
    pids = {line["pid"] for line in server.wait_for("listening", 2)}
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that has ended and that nobody has asked about yet is a zombie.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_in_front_of_another_server(process: Callable[..., Any], server: str) -> None:
    env = {"PUMICE_API_KEY": "front-door-key", "PUMICE_UPSTREAM_KEY": "unused"}
    front = process("--upstream", f"{server}/v1", "--max-tokens", "20", "--default-tokens", "6", env=env)
    url, key = front.url, {"Authorization": "Bearer front-door-key"}
    assert post(url, ask()).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=key).json()["data"][0]["id"] == "tiny"
    direct, passed = post(server, ask("Who?")).json(), post(url, ask("Who?"), headers=key).json()
    assert passed["choices"] == direct["choices"]
    unlimited = ask()
    del unlimited["max_tokens"]
    assert post(url, unlimited, headers=key).json()["usage"]["completion_tokens"] == 6
    wrong = post(url, ask(max_tokens=21), headers=key)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_tokens")
    assert post(url, ask(n=2), headers=key).json()["error"]["param"] == "n"
    assert (
        post(url, ask(temperature=9), headers=key).json()["error"]["param"] == "temperature"
    )  # upstream's word
    explained = post(url, {"messages": [{"role": "user", "content": "?"}]}, "/explain", headers=key)
    assert (explained.status_code, explained.json()["error"]["code"]) == (404, "not_explained")
    web = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/cat.jpg"}}
    body = {"messages": [{"role": "user", "content": [web, {"type": "text", "text": "?"}]}]}
    assert post(url, body, headers=key).json()["error"]["code"] == "image_urls_not_allowed"
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=ask(stream=True), headers=key, timeout=60
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_an_upstream_that_is_away(process: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        front = process("--upstream", f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        response = post(front.url, ask())
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_away"
        assert httpx.get(f"{front.url}/health").json()["status"] == "away"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "the port is 99999"),
        (["--host", "nowhere.invalid"], "no address of this machine"),
        (["--max-body", "huge"], "the size 'huge' is not valid"),
        (["--api-key", "x"], "an API key is too short"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key-file", "missing"], "the keys 'missing' cannot be read"),
        (["--upstream", "localhost"], "the upstream 'localhost' is not an address"),
        (["--workers", "1000"], "on a machine of"),
        (["--log", "xml"], "--log is 'xml'"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_an_empty_variable_is_no_open_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUMICE_API_KEY", " ,")
    result = CliRunner().invoke(app, ["serve", "--port", "0"])
    assert result.exit_code == 2
    assert "PUMICE_API_KEY is empty" in " ".join(result.output.split())


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "choose another --port" in result.output
