"""What one client sends takes bounded memory, and comes back shortened."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import ask, data_uri, picture, post, wait_until
from pydantic import ValidationError
from test_limits import error_of

from pumice.engine.grammar_check import check_grammars
from pumice.serve import backend, guard, work
from pumice.serve.connection import FED, MAX_HEADERS, MAX_PIPELINED
from pumice.serve.errors import ApiError, validation_error
from pumice.serve.messages import parse
from pumice.serve.protocol import ChatRequest
from pumice.tokens import PIECE, Tokenizer

KB = 1024


def connect(url: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    connection.settimeout(60)
    return connection


def parts_until_closed(url: str, head: bytes, block: bytes) -> int:
    """Send a head, then a block again and again until the server closes; return the bytes that were taken."""
    sent = 0
    with connect(url) as connection:
        try:
            connection.sendall(head)
            while sent < 30_000 * KB:
                connection.sendall(block)
                sent += len(block)
        except OSError:
            pass
    return sent


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "block"),
    [
        (POST, b"a: b\r\n" * 2000),
        (POST + b"a: ", b"b" * 10_000),
        (POST, b"b" * 10_000),
        (b"GET /", b"x" * 10_000),
        (b"", b"\r\n" * 10_000),
        (CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n" * 2000),
        (CHUNKED + b"2\r\n{}\r\n0\r\na: ", b"b" * 10_000),
        (CHUNKED + b"2;a=", b"b" * 10_000),
        (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000),
    ],
    ids=[
        "many",
        "a-value",
        "a-name",
        "an-address",
        "blank-lines",
        "trailers",
        "a-trailer",
        "extension",
        "pipeline",
    ],
)
def test_headers_without_end(server: str, head: bytes, block: bytes) -> None:
    """The connection is closed after some kilobytes; the system's buffers take some more."""
    assert parts_until_closed(server, head, block) < 20_000 * KB
    assert httpx.get(f"{server}/health").status_code == 200


def test_headers_that_are_too_large_are_refused_in_json(local: Any) -> None:
    with local(api_key=("secret-key",)) as url:  # before any key is asked for
        with connect(url) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * (MAX_HEADERS + FED))
            head, _, body = connection.recv(4096).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert json.loads(body)["error"]["code"] == "headers_too_large"
        with connect(url) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            head, _, body = connection.recv(4096).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_headers_and_requests_within_the_limits(server: str) -> None:
    large = {"a": "b" * (MAX_HEADERS // 2)}
    with httpx.Client() as client:  # one connection, whose headers are counted anew for each request
        for _ in range(10):
            assert client.get(f"{server}/health", headers=large).status_code == 200
        headers = {"Content-Type": "application/json"}  # a body is not counted
        body = json.dumps(ask()).encode() + b" " * (2 * MAX_HEADERS)
        response = client.post(f"{server}/v1/chat/completions", content=body, headers=headers, timeout=60)
        assert response.status_code == 200
    content = json.dumps(ask()).encode() + b" " * (MAX_HEADERS // 4)
    with connect(server) as connection:  # five bytes of frame for each byte of the body
        connection.sendall(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_requests_that_wait_behind_one(server: str, caplog: pytest.LogCaptureFixture) -> None:
    """They arrive together. One more than the limit closes the connection, and the log says why."""
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(health * (1 + MAX_PIPELINED))
        data = b""
        while data.count(b"HTTP/1.1 200") < 1 + MAX_PIPELINED:
            part = connection.recv(1 << 16)
            assert part, "the connection was closed"
            data += part
    caplog.set_level("INFO", "pumice.serve")
    with connect(server) as connection:
        connection.sendall(health * (2 + MAX_PIPELINED))
        assert connection.recv(1 << 16) == b""
    codes = [record.__dict__["fields"].get("code") for record in caplog.records if "fields" in vars(record)]
    assert "pipeline_full" in codes


def test_bodies_in_flight_share_a_limit(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "REQUEST_MEMORY", 0)  # so that it is twice what the largest body takes
    with local(max_body="10K") as url:
        body = json.dumps(ask("x" * 9 * KB)).encode()
        head = POST + f"Content-Length: {len(body)}\r\n\r\n".encode()
        held = [connect(url) for _ in range(2)]
        for connection in held:
            connection.sendall(head + body[:-1])
        for _ in range(1000):  # until they have arrived, it is read, and too long for the model
            refused = post(url, ask("x" * 3 * KB))
            if refused.status_code == 429:
                break
            assert refused.status_code == 400
        assert error_of(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        for connection in held:
            connection.close()
        while post(url, ask()).status_code != 200:
            pass


def test_prepared_prompts_share_the_limit(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tower will see counts, and what is told of each token. Alone, none of these could ever fit."""
    monkeypatch.setattr(guard, "REQUEST_MEMORY", 0)
    with local(max_body="12K") as url:  # so that 72 kB may be taken, of which pixels take 49 kB for a picture
        assert post(url, ask("What?", picture())).status_code == 200
        assert error_of(post(url, ask("What?", picture(), picture(1))), 413)["code"] == "request_too_large"
        body = {"prompt": "x y z " * 20, "max_tokens": 1, "echo": True}
        assert post(url, body, "/v1/completions").status_code == 200
        scored = {**body, "logprobs": 1}
        assert error_of(post(url, scored, "/v1/completions"), 413)["code"] == "request_too_large"
        for count, top, status in ((4, 3, 200), (40, 3, 413), (4, 20, 413)):  # each takes 1 kB
            scored = ask(max_tokens=count, logprobs=True, top_logprobs=top)
            assert post(url, scored).status_code == status
        monkeypatch.setattr(backend, "TOKEN_BYTES", 100_000)
        assert error_of(post(url, body, "/v1/completions"), 413)["code"] == "request_too_large"


def test_few_schemas_stay_compiled(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def check(grammars: list[str]) -> list[str]:
        compiled.extend(grammars)
        return check_grammars(grammars)

    monkeypatch.setattr(backend, "check_grammars", check)
    monkeypatch.setattr(backend, "MAX_GRAMMARS", 2)
    with local() as url:
        for choice, count in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4)):
            assert post(url, ask(guided_choice=[choice])).status_code == 200
            assert len(compiled) == count  # the one that was used last stays


MANY = 140_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1] * MANY}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        ("/v1/chat/completions", {**ask(), "metadata": {str(n): "" for n in range(MANY // 2)}}),
        ("/explain", {"messages": [[[]]] * (MANY // 3)}),
    ],
    ids=["ids", "parts", "keys", "lists"],
)
def test_bodies_of_too_many_values(server: str, path: str, body: Any) -> None:
    assert error_of(post(server, body, path), 400)["code"] == "too_many_values"


LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({**ask(), "model": LONG}, 404, "model_not_found"),
        ({**ask(), LONG: 1}, 400, "unknown_field"),
        ({**ask(), "metadata": {LONG: 1}}, 400, "invalid_value"),
        ({"messages": [{"role": LONG, "content": "a"}]}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": LONG}]}]}, 400, "invalid_value"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": LONG}]}, 400, "unknown_tool_call"),
        ({**ask(), "stop": LONG}, 400, "invalid_value"),
        ({**ask(), "stop": ["a", LONG]}, 400, "invalid_value"),
        ({**ask(), "tool_choice": {"type": "function", "function": {"name": LONG}}}, 400, "missing_tools"),
        ({**ask(), "response_format": {"type": LONG}}, 400, "invalid_value"),
        ({**ask(), "guided_regex": LONG}, 400, "invalid_regex"),
        ({**ask(), "guided_json": LONG}, 400, "invalid_json_schema"),
        ({**ask(), "guided_choice": [LONG]}, 400, "invalid_choice"),
    ],
)
def test_what_comes_back_is_shortened(
    server: str, caplog: pytest.LogCaptureFixture, body: Any, status: int, code: str
) -> None:
    caplog.set_level("INFO", "pumice.serve")
    response = post(server, body)
    assert error_of(response, status)["code"] == code
    assert len(response.content) < 2 * KB
    assert LONG[:201] not in response.text
    wait_until(lambda: caplog.records)
    logged = json.dumps(caplog.records[-1].__dict__["fields"])
    assert len(logged) < 2 * KB
    assert LONG[:201] not in logged


def test_a_long_name_of_a_field_takes_no_memory() -> None:
    """It is compared with the names of all fields."""
    with pytest.raises(ValidationError) as caught:
        parse(ChatRequest, json.dumps({**ask(), LONG: 1}).encode())
    tracemalloc.start()
    try:
        assert validation_error(caught.value, ChatRequest.model_fields).code == "unknown_field"
        assert tracemalloc.get_traced_memory()[1] < 4 * len(LONG)
    finally:
        tracemalloc.stop()


def test_no_error_is_longer_than_a_thousand_characters() -> None:
    assert ApiError(400, "x" * 2000).message == "x" * 1000 + "... (2000 characters)"


def test_a_token_of_too_many_digits_comes_back_shortened(server: str) -> None:
    response = post(server, {"prompt": [10**4000]}, "/v1/completions")
    assert "the prompt has the token 1000" in error_of(response, 400)["message"]
    assert len(response.content) < KB


def test_long_headers_come_back_shortened(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "pumice.serve")
    long = "x" * (MAX_HEADERS // 2)
    for response in (
        httpx.get(f"{server}/{long}"),
        httpx.get(f"{server}/v1/models/{long}"),
        httpx.get(f"{server}/health", headers={"Host": long}),
        httpx.post(f"{server}/v1/completions", headers={"Content-Type": long}),
    ):
        assert response.status_code in (404, 415, 421)
        assert len(response.content) < 2 * KB
        assert long[:201] not in response.text
    while len(caplog.records) < 4:
        pass
    for record in caplog.records:
        assert long[:201] not in json.dumps(record.__dict__["fields"])


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that were tokenized, in characters."""
    lengths: list[int] = []
    encode = Tokenizer._encode

    def noted(tokenizer: Tokenizer, text: str) -> Any:
        lengths.append(len(text))
        return encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "_encode", noted)
    return lengths


def test_texts_that_cannot_fit_are_refused_before_they_are_tokenized(
    server: str, tokenized: list[int]
) -> None:
    for path, body in (
        ("/v1/chat/completions", ask("word " * 1_000_000)),
        ("/v1/completions", {"prompt": "word " * 1_000_000}),
        ("/v1/messages", {**ask("word " * 1_000_000)}),
    ):
        response = post(server, body, path)
        assert response.status_code == 400
        assert "maximum context length is 256 tokens" in response.json()["error"]["message"]
        assert response.json()["error"]["code"] == "context_length_exceeded"
    assert max(tokenized, default=0) <= PIECE


def test_answers_too_long_to_explain(roomy: str, tokenized: list[int]) -> None:
    question = ask("What?", picture())["messages"]
    for words in (600, 1_000_000):
        body = {"messages": [*question, {"role": "assistant", "content": "dog " * words}]}
        error = error_of(post(roomy, body, "/explain"), 400)
        assert error["param"] == "messages"
    assert max(tokenized, default=0) <= PIECE


def test_pictures_to_explain_have_a_limit_together(local: Any) -> None:
    with local(max_pixels=40 * 30 * 2) as url:
        for count, status in ((2, 200), (3, 400)):
            shown = ask("What?", *(picture(number) for number in range(count)))["messages"]
            body = {"messages": [*shown, {"role": "assistant", "content": "A dog."}]}
            response = post(url, body, "/explain")
            assert response.status_code == status
        assert error_of(response, 400)["code"] == "image_too_large"


@pytest.mark.parametrize(("kind", "times"), [("long", 1), ("explain", 1), ("short", 0)])
def test_memory_of_long_work_goes_back(monkeypatch: pytest.MonkeyPatch, kind: Any, times: int) -> None:
    calls: list[int] = []
    monkeypatch.setattr(work, "return_freed_memory", lambda: calls.append(1))
    workers = work.Workers()
    assert asyncio.run(workers.run(kind, lambda: 3)) == 3
    workers.close()
    assert len(calls) == times


def test_memory_of_large_requests_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = threading.Event()
    monkeypatch.setattr(work, "return_freed_memory", returned.set)
    threads = threading.active_count()
    account = work.Account(work.Memory(4 * work.LARGE))
    account.take(work.LARGE)
    account.close()
    assert threading.active_count() == threads
    account.take(work.LARGE + 1)
    account.close()
    assert returned.wait(60)
    assert account.memory.taken == 0


def test_a_data_uri_without_data(server: str) -> None:
    url = "data:" + "image/png" * 1_000_000
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert error_of(post(server, body), 400)["code"] == "invalid_image_url"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell of memory")
def test_memory_stays_within_its_bound(process: Callable[..., Any]) -> None:
    """Large bodies of all kinds, one after the other, leave nothing behind."""
    server = process("--max-body", "10M")

    def resident() -> int:
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS"))

    def bodies() -> Iterator[Any]:
        yield {**ask(), "model": "x" * 6_000_000}
        yield ask("word " * 1_200_000)
        part = {"type": "image_url", "image_url": {"url": noise}}
        yield {"messages": [{"role": "user", "content": [part]}]}

    noise = data_uri(bytes(4_500_000))
    for _ in range(2):
        for body in bodies():
            assert post(server.url, body).status_code in (400, 404)
    before = resident()
    for _ in range(10):
        for body in bodies():
            assert post(server.url, body).status_code in (400, 404)
    assert resident() - before < 60  # of 180 MB


def test_a_header_line_is_logged_once(local: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pumice.serve")
    with local() as url, connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * (MAX_HEADERS + FED))
        assert connection.recv(4096)
    assert [record.message for record in caplog.records].count("refused") == 1
