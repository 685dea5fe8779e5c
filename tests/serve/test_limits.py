"""Wrong requests: a status, a sentence, the field's name, never a trace; and limits that hold."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import ask, data_uri, picture, post, user_message, wait_until

from pumice import InputError
from pumice.assistant import load
from pumice.engine import sizes
from pumice.engine.engine import Engine
from pumice.serve.guard import Gate
from pumice.serve.run import make_server
from pumice.serve.settings import ServerSettings

# a bitmap's header that claims 60,000 pixels a side
ENORMOUS = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


def with_url(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}


FIELD = "messages.0.content.0.image_url"


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"dry_multiplier": 0.8}, "dry_multiplier", "unknown field"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is missing"),
        ({"banana": 1}, "banana", "unknown field 'banana'; leave it out"),
        ({"max_token": 1}, "max_token", "unknown field 'max_token'; did you mean 'max_tokens'?"),
        ({"images": ["a"]}, "images", "unknown field 'images'; leave it out"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"return_progress": True}, "return_progress", "needs stream"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"model": "gpt-5"}, "model", "no model 'gpt-5'"),
        ({"messages": []}, "messages", "should have at least 1 item, not 0"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages.0.role",
            "'system', 'developer', 'user'",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing or null; give text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "is missing or null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "or a list of parts"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content", "or a list of parts"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0", "or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages.0.content.0.type",
            "no part 'video' here; give text, or a list of parts whose type is 'text', 'image_url' or "
            "'video_url'",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "question is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "set continue_final_message"),
        (
            {"messages": [{"role": "user", "content": "a"}], "continue_final_message": True},
            "messages",
            "the last message must be the assistant's",
        ),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "is false where continue_final_message is true",
        ),
        (
            {"messages": [{"role": "user", "content": "long " * 300}]},
            "messages",
            "maximum context length is 256",
        ),
        (
            {"add_generation_prompt": False},
            "add_generation_prompt",
            "is false only where continue_final",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs a schema"),
        ({"response_format": {"type": "regex"}}, "response_format.value", "needs a regular expression"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is missing",
        ),
    ],
)
def test_wrong_fields(server: str, more: dict[str, Any], param: str | None, message: str) -> None:
    body = {"messages": [{"role": "user", "content": "What?"}], **more}
    error = error_of(post(server, body), 404 if "model" in more else 400)
    assert error["param"] == param
    assert error["code"]
    assert message in error["message"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "at least 1 character"),
        ("cat.jpg", "give a picture as data:"),
        ("file:///etc/passwd", "give a picture as data:"),
        ("http://example.org/a.jpg", "fetches no pictures"),
        ("data:image/png", "no data URL"),
        ("data:image/png;base64,$$$$", f"'{FIELD}': '$$$$' is not base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:text/plain,hello", "not a picture"),
        (data_uri(b"GIF89a"), "not a picture"),
        (data_uri(picture()[:-200]), "truncated or damaged"),
        (data_uri(picture(size=(300, 300))), "is 300 x 300, more than 0.01 megapixels"),
        (data_uri(ENORMOUS), "has more than 0.01 megapixels"),  # and not more than the library's own limit
    ],
)
def test_wrong_pictures(small: str, url: str, message: str) -> None:
    error = error_of(post(small, with_url(url)), 400)
    assert error["param"].startswith(FIELD)
    assert message in error["message"]


def test_what_the_cache_cannot_hold_names_the_field_to_change(local: Any) -> None:
    long = "long " * 40
    with local(cache_tokens=60) as url:
        for body, path, param in (
            (ask(long), "/v1/chat/completions", "messages"),
            ({"prompt": long}, "/v1/completions", "prompt"),
        ):
            error = error_of(post(url, body, path), 400)
            assert (error["param"], error["code"]) == (param, "context_length_exceeded")
            assert "maximum context length is 60 tokens" in error["message"]


@pytest.mark.parametrize(("tokens", "said"), [(60, 1), (10**4, 0), (None, 0)])
def test_a_cache_that_limits_the_context_is_told_at_the_start(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, tokens: int | None, said: int
) -> None:
    assistant = load(tiny_folder, device="cpu", quantize=None, cache_tokens=tokens)
    make_server(assistant, ("tiny",), ServerSettings(port=0, cache_tokens=tokens).check())
    told = [record for record in caplog.records if "--cache-tokens is less" in record.getMessage()]
    assert [record.__dict__["fields"] for record in told] == said * [{"cache_tokens": 60, "context": 256}]


def test_without_memory_for_the_cache_the_client_is_told_why(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "available_memory", lambda: 10 * sizes.RESERVE)
    with local() as url:
        monkeypatch.setattr(sizes, "available_memory", lambda: sizes.RESERVE / 2)  # another process took it
        error = error_of(post(url, ask()), 500)
        assert error["message"].startswith("no memory is left for the KV cache; close other programs")
        monkeypatch.setattr(sizes, "available_memory", lambda: 10 * sizes.RESERVE)
        assert post(url, ask()).status_code == 200


@pytest.fixture(scope="module")
def small(local: Any) -> Any:
    with local(max_pixels=10_000, max_images=2, max_body="600000") as url:
        yield url


ANSWER = {"role": "assistant", "content": "A dog."}


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([user_message("What?", picture())], "messages", "must be the assistant's"),
        ([ANSWER], "messages", "there are no messages"),
        ([user_message("What?"), ANSWER], "messages", "there is no picture to explain"),
        (
            [user_message("What?", picture()), {**ANSWER, "content": " "}],
            "messages",
            "the answer to explain is empty",
        ),
        (
            [user_message("What?", picture()), {**ANSWER, "content": "dog " * 300}],
            "messages",
            "context length is 256 tokens",
        ),
        ([user_message("What?", picture()[:-200]), ANSWER], FIELD, "truncated or damaged"),
    ],
)
def test_what_cannot_be_explained(server: str, messages: Any, param: str, message: str) -> None:
    error = error_of(post(server, {"messages": messages}, "/explain"), 400)
    assert message in error["message"]
    assert error["param"] == param


def test_the_damaged_one_of_several_is_named(small: str) -> None:
    error = error_of(post(small, ask("What?", picture(), picture()[:-200])), 400)
    assert error["param"] == "messages.0.content.1.image_url"


def test_too_many_pictures_and_too_large_bodies(small: str) -> None:
    error = error_of(post(small, ask("What?", *[picture()] * 3)), 400)
    assert error["param"] == "messages.0.content.2.image_url"
    assert "3 pictures; show at most 2" in error["message"]
    assert "larger than 600000 bytes" in error_of(post(small, ask("x" * 700_000)), 413)["message"]

    def chunks() -> Any:  # without a Content-Length
        for _ in range(8):
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{small}/v1/chat/completions", content=chunks(), headers=headers, timeout=60)
    error_of(response, 413)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"\xff",
        b"null",
        b"[" * 100_000,
        b'{"messages": "\\ud800"}',
        b"{}",
        b"NaN",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/explain"])
def test_bodies_that_are_none(server: str, body: bytes, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    error_of(httpx.post(server + path, content=body, headers=headers, timeout=60), 400)


def test_a_body_must_be_json_by_its_type(server: str) -> None:
    """A page elsewhere can send text/plain without a CORS preflight, so that it must not be understood."""
    content = json.dumps(ask()).encode()
    address = f"{server}/v1/chat/completions"
    for headers in ({"Content-Type": "text/plain"}, {"Origin": "https://a.example"}):
        error_of(httpx.post(address, content=content, headers=headers), 415)
    assert httpx.post(address, content=content, timeout=60).status_code == 200  # no browser, no type


def test_what_was_refused_is_logged(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pumice.serve")
    error_of(post(server, ask(n=0), headers={"X-Request-Id": "wrong-n"}), 400)
    wait_until(lambda: bool(caplog.records))
    fields = caplog.records[-1].__dict__["fields"]
    assert (fields["request_id"], fields["status"], fields["param"]) == ("wrong-n", 400, "n")
    assert "greater than or equal to 1" in fields["error"]


def test_addresses_and_methods(server: str) -> None:
    error_of(httpx.get(f"{server}/v1/chat/completions"), 405)
    error_of(httpx.post(f"{server}/health"), 405)
    error_of(httpx.get(f"{server}/nothing"), 404)
    error_of(httpx.get(f"{server}/v1/models/other"), 404)
    assert httpx.get(f"{server}/health").json()["status"] == "ok"
    assert "pumice_requests_total" in httpx.get(f"{server}/metrics").text


def test_request_ids(server: str) -> None:
    assert httpx.get(f"{server}/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    odd = httpx.get(f"{server}/health", headers={"X-Request-Id": "a b" * 100})
    assert odd.headers["x-request-id"].startswith("req-")


def test_strange_host_names(server: str, local: Any) -> None:
    """A name that resolves to this machine lets a page elsewhere reach it, unless it is refused."""
    error_of(httpx.get(f"{server}/v1/models", headers={"Host": "evil.example"}), 421)
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert httpx.get(f"{server}/v1/models", headers={"Host": host}).status_code == 200
    with local(allow_host=("chat.example",)) as url:
        assert httpx.get(f"{url}/v1/models", headers={"Host": "chat.example"}).status_code == 200


def test_keys_and_other_origins(local: Any) -> None:
    origin = {"Origin": "https://app.example"}
    with local(api_key=("first-key", "second-key"), cors=("https://app.example",)) as url:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}):
            response = httpx.get(f"{url}/v1/models", headers={**header, **origin})
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["access-control-allow-origin"] == "https://app.example"
        error_of(post(url, ask()), 401)
        error_of(post(url, ask(), "/explain"), 401)
        error_of(httpx.get(f"{url}/metrics"), 401)
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/").status_code == 200
        for key in ("first-key", "second-key"):
            response = post(url, ask(), headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{url}/v1/chat/completions", headers=preflight).status_code == 200
        preflight["Origin"] = "https://evil.example"
        response = httpx.options(f"{url}/v1/chat/completions", headers=preflight)
        assert "access-control-allow-origin" not in response.headers


def test_other_origins_are_off(server: str) -> None:
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{server}/v1/chat/completions", headers=preflight)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


def test_a_full_queue(local: Any) -> None:
    with local(slots=1, queue=1) as url, concurrent.futures.ThreadPoolExecutor(12) as pool:
        body = ask(max_tokens=200)
        responses = list(pool.map(lambda _: post(url, body), range(12)))
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 429}
        refused = responses[statuses.index(429)]
        assert error_of(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert post(url, ask()).status_code == 200  # and afterwards there is room again


def test_retry_after_follows_from_the_queue() -> None:
    gate = Gate(slots=16, queue=80, in_flight=96, interval=0.1375)
    assert (gate.full, gate.retry_after) == (True, 11)  # 80 wait, and an answer ends every 0.1375 s
    gate = Gate(slots=16, queue=80, in_flight=15, interval=100.0)
    assert (gate.full, gate.retry_after) == (False, 1)
    with pytest.raises(RuntimeError), gate.passing(lambda: False):  # a wrong request, which takes no time
        assert gate.in_flight == 16
        raise RuntimeError
    assert (gate.in_flight, gate.interval) == (15, 100)
    with gate.passing(lambda: True):
        pass
    assert 89 < gate.interval < 91  # a tenth of the way to an answer that took no time


def test_the_interval_of_answers_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 at a time that take 4 s each end every quarter of a second; so do 80 of which each takes 20 s."""
    now = 0.0
    monkeypatch.setattr("pumice.serve.guard.time.perf_counter", lambda: now)
    for in_flight, seconds in ((16, 4.0), (80, 20.0)):
        gate = Gate(slots=16, queue=64)
        for _ in range(200):
            gate.in_flight = in_flight - 1
            with gate.passing(lambda: True):
                now += seconds
        assert gate.interval == pytest.approx(0.25)
        gate.in_flight = 80
        assert gate.retry_after == 16


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model so small would have answered before anybody can leave."""
    step = Engine.step

    def slow(engine: Engine) -> bool:
        time.sleep(0.01)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow)


@pytest.mark.usefixtures("slowly")
def test_an_answer_that_takes_too_long(local: Any) -> None:
    with local(timeout=0.05) as url:
        assert error_of(post(url, ask(max_tokens=200)), 504)["code"] == "timeout"
        assert _settled(url)


def test_a_body_that_never_arrives(local: Any) -> None:
    with local(body_timeout=0.3) as url:
        port = int(url.rpartition(":")[2])
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
            connection.settimeout(60)
            assert b" 408 " in connection.recv(4096)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head)  # and no end of the headers
            connection.settimeout(60)
            assert connection.recv(4096) == b""


@pytest.mark.usefixtures("slowly")
def test_readers_who_go_away_end_their_requests(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pumice.serve")
    for stream in (False, True):
        before = _count(server, "pumice_cancelled_requests_total")
        # This seed draws an answer that fills the context; others draw four tokens.
        body = json.dumps(ask(max_tokens=2000, temperature=1.0, seed=0, stream=stream))
        port = int(server.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}{body}".encode()
            )
            wait_until(lambda: _count(server, "pumice_running_requests") >= 1)
        wait_until(lambda before=before: _count(server, "pumice_cancelled_requests_total") > before)
        assert _settled(server)
    lines = [line.__dict__["fields"] for line in caplog.records if line.levelname == "INFO"]
    assert sum(bool(line.get("gone")) for line in lines) == 2
    assert not [line for line in caplog.records if line.levelname == "ERROR"]


def test_too_many_connections(local: Any) -> None:
    with local(max_connections=2) as url:
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        try:
            wait_until(lambda: httpx.get(f"{url}/health").status_code == 429)
        finally:
            for connection in idle:
                connection.close()
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_a_fault_of_ours_is_told_with_an_id_and_logged_with_a_trace(
    local: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pumice.serve import backend

    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(backend, "conversation", fail)
    with local() as url, caplog.at_level("ERROR", "pumice.serve"):
        response = post(url, ask(), headers={"X-Request-Id": "find-me"})
        error = error_of(response, 500)
        assert "find-me" in error["message"]
        assert "secret" not in response.text
        wait_until(lambda: bool(caplog.records))
    [line] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.__dict__["fields"]["request_id"] == "find-me"
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 70000}, "the port is 70000"),
        ({"queue": -1}, "queue is -1"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"api_key": ("short",)}, "fewer than 8 characters"),
        ({"cors": ("app.example",)}, "CORS origin 'app.example'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServerSettings(**wrong).check()


def _count(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def _settled(url: str) -> bool:
    wait_until(lambda: _count(url, "pumice_running_requests") == _count(url, "pumice_waiting_requests") == 0)
    return True
