"""`pumice serve` as a process: signals, wrong options."""

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
    assert server.log()[-1]["message"] == "stopped"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "the port is 99999"),
        (["--host", "nowhere.invalid"], "no address of this machine"),
        (["--max-body", "huge"], "the size 'huge' is not valid"),
        (["--api-key", "x"], "an API key has fewer than 8 characters"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key-file", "missing"], "the keys 'missing' cannot be read"),
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
