"""Every error has the form of the protocol that was asked in: OpenAI's, Anthropic's, or Ollama's."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from asking import post

from pumice.errors import InputError
from pumice.serve.anthropic import AnthropicForm, AnthropicRequest
from pumice.serve.errors import ApiError, is_stopping, timed_out
from pumice.serve.messages import parse
from pumice.serve.ollama import OllamaForm
from pumice.serve.protocol import ChatRequest
from pumice.serve.responses import ResponsesRequest
from pumice.serve.responses_form import ResponsesForm
from pumice.serve.stored import StoredItems

# Status -> the types that OpenAI and Anthropic give it.
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    421: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("service_unavailable_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}
MESSAGES = [{"role": "user", "content": "a"}]
VALID: dict[str, Any] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "a"},
    "/api/show": {},
}
KEY = "secret-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def check(path: str, status: int, body: dict[str, Any]) -> None:
    """Check the form of an error's body."""
    if path.startswith("/api/"):
        assert set(body) == {"error"}
        assert isinstance(body["error"], str)
        assert body["error"]
        return
    is_anthropic = path.startswith("/v1/messages")
    assert set(body) == ({"type", "error"} if is_anthropic else {"error"})
    assert body.get("type", "error") == "error"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["type"] == TYPES[status][is_anthropic]


@pytest.fixture(scope="module")
def strict(local: Any) -> Iterator[str]:
    """A server with a key that answers one request at a time and takes small bodies that arrive soon."""
    with local(slots=1, queue=0, api_key=(KEY,), max_body="1K", body_timeout=1) as url:
        yield url


@pytest.mark.parametrize("path", VALID)
def test_errors_of_requests(server: str, strict: str, path: str) -> None:
    expected = {
        400: post(server, {"banana": 1}, path),
        401: post(strict, {}, path),
        404: post(server, {"model": "other", **VALID[path]}, path),
        405: httpx.get(server + path, timeout=60),
        413: post(strict, {"model": "x" * 2000}, path, headers=HEADERS),
        415: httpx.post(server + path, content=b"{}", headers={"Content-Type": "text/plain"}, timeout=60),
        421: httpx.get(server + path, headers={"Host": "evil.example"}, timeout=60),
    }
    assert {status: response.status_code for status, response in expected.items()} == {n: n for n in expected}
    for status, response in expected.items():
        check(path, status, response.json())
    nothing = post(server, {}, f"{path}/nothing")
    check(path, nothing.status_code, nothing.json())
    assert nothing.status_code == 404


@pytest.mark.parametrize("path", VALID)
def test_errors_of_a_server_that_is_busy(strict: str, path: str) -> None:
    """A body that does not arrive holds the only place, until it is too late."""
    address = ("127.0.0.1", int(strict.rpartition(":")[2]))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    for _ in range(60):  # until the body that does not arrive came first
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode())
            connection.settimeout(60)
            busy = post(strict, {}, path, headers=HEADERS)
            late = connection.recv(1 << 16).decode()
        if busy.status_code == 429:
            break
    check(path, 429, busy.json())
    assert int(busy.headers["retry-after"]) >= 1
    assert " 408 " in late.splitlines()[0]
    check(path, 408, json.loads(late.partition("\r\n\r\n")[2]))


@pytest.mark.parametrize("path", VALID)
def test_errors_that_end_an_answer(path: str) -> None:
    """Before it begins, and in a stream."""
    for error in (is_stopping(), timed_out(1.0), ApiError(500, "the server failed", code="internal_error")):
        response = error.response(path)
        assert response.status_code == error.status
        check(path, error.status, json.loads(bytes(response.body)))
        if path == "/v1/messages":
            event = AnthropicForm("tiny", AnthropicRequest.model_construct()).error(error.body()).decode()
            assert event.startswith("event: error\ndata: ")
            assert event.endswith("\n\n")
            check(path, error.status, json.loads(event.partition("data: ")[2]))
        elif path.startswith("/api/"):
            line = OllamaForm("tiny", path == "/api/chat").error(error.body())
            assert line.endswith(b"\n")
            check(path, error.status, json.loads(line))
        elif path == "/v1/responses":
            form = ResponsesForm("tiny", ResponsesRequest(input="a"), StoredItems(), b"")
            values = json.loads(form.error(error.body()).decode().partition("data: ")[2])
            assert (values["type"], values["code"]) == ("error", error.code)
            assert values["message"] == error.message


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b'{"messages": ', "line 1, column 14: it ends too early"),
        (b'{"messages": []\n"model": 1}', "line 2, column 1: a comma or a closing bracket is missing"),
        (b'{"user": "\xff"}', "it is not UTF-8 text"),
    ],
)
def test_a_body_that_is_not_json_is_told_in_plain_words(body: bytes, fault: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(ChatRequest, body)
    assert str(refused.value) == f"the body is not JSON: {fault}"
