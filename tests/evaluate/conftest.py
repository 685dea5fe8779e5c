"""A server on this machine that speaks OpenAI's chat completions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pumice.chat_client import ChatEndpoint


class ChatServer:
    """Answers with `replies` in turn, then with 0.5; a number is a status. Every request is kept.

    A reply may also be a function of the request's question.
    """

    def __init__(self, *replies: Any) -> None:
        self.replies, self.asked = list(replies), []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.asked.append(body)
                reply = owner.replies.pop(0) if owner.replies else "0.5"
                if callable(reply):
                    reply = reply(body)
                status = reply if isinstance(reply, int) else 200
                message = {"model": "judge-1", "choices": [{"message": {"content": reply}}]}
                data = b"no" if status != 200 else json.dumps(message).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def endpoint(self, model: str = "judge", parallel: int = 1) -> ChatEndpoint:
        url = f"http://127.0.0.1:{self.server.server_port}/v1/"
        return ChatEndpoint(url, model, parallel=parallel, attempts=5, backoff=0.0)


@pytest.fixture
def chat_server() -> Iterator[Callable[..., ChatServer]]:
    started: list[ChatServer] = []

    def start(*replies: Any) -> ChatServer:
        started.append(ChatServer(*replies))
        return started[-1]

    yield start
    for made in started:
        made.server.shutdown()
        made.server.server_close()
