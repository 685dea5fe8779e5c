"""A teacher for tests: an OpenAI-compatible endpoint on this machine that can be told to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ANIMALS = ("dog", "cat", "horse", "cow", "sheep", "bird", "elephant", "bear")
PLACES = ("beach", "garden", "street", "meadow", "kitchen", "forest", "bridge", "harbour")
COLOURS = ("red", "blue", "green", "white", "brown", "black", "yellow", "grey")
DEEDS = ("sleeps", "runs", "waits", "plays", "eats", "jumps", "rests", "looks")


def scene(number: int) -> dict[str, str]:
    """What is in made-up picture `number`; all of the first 4,096 differ."""
    words = (ANIMALS, PLACES, COLOURS, DEEDS)
    return dict(
        zip(
            ("animal", "place", "colour", "deed"),
            (w[number // 8**n % 8] for n, w in enumerate(words)),
            strict=True,
        )
    )


def annotations(path: Path, count: int) -> Path:
    """JSON Lines of `count` made-up pictures."""
    with path.open("w") as file:
        for number in range(count):
            s = scene(number)
            caption = f"Picture {number}: a {s['colour']} {s['animal']} {s['deed']} at the {s['place']}."
            box = {"category": s["animal"], "box": [0.1, 0.2, 0.5, 0.75]}
            file.write(
                json.dumps({"image": f"p{number:05d}.jpg", "captions": [caption], "boxes": [box]}) + "\n"
            )
    return path


def answer(system: str, user: str) -> str:
    """What a good teacher writes: a function of the request alone."""
    words = user.split()
    colour, animal, deed = words[3], words[4], words[5]
    location = user.split(" at the ", 2)[1].split(".", 1)[0]
    number = words[1].strip(":")
    if "single word or a short phrase" in system:
        return f"Question: Which animal is it?\nAnswer: {animal}\n\nQuestion: Its colour?\nAnswer: {colour}"
    if "Describe the picture in detail" in system:
        return (
            f"At the {location} there is a {animal} with {colour} fur, and it {deed} there. One looks from a "
            f"little way off, and the {animal} takes up the left half. House number {number} can be read on "
            f"a post, and below it {int(number) * 7919} is scratched into the wood."
        )
    return (
        f"Question: What animal is at the {location}?\n"
        f"Answer: There is a {colour} {animal} at the {location}.\n\n"
        f"Question: What does it do near post {number}?\nAnswer: It {deed} beside post {number} there."
    )


class Endpoint:
    """Counts every call. fail(key, call) says how the call-th call of a request goes wrong: "" or a mode."""

    def __init__(self, fail: Callable[[str, int], str] = lambda key, call: "") -> None:
        self.fail = fail
        self.reply: Callable[[str, str], str] = answer
        self.calls: Counter[str] = Counter()  # by request
        self.modes: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.tokens = [0, 0]  # what a provider would bill
        self.delay = 0.0
        self.over = threading.Event()
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def total(self) -> int:
        return sum(self.calls.values())

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        data = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(data)
        key = hashlib.sha256(data).hexdigest()
        with self.lock:
            self.calls[key] += 1
            mode = self.fail(key, self.calls[key])
            self.modes[mode] += 1
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            self.over.wait(self.delay)
            self.respond(handler, body, mode)
        except OSError:
            pass  # the caller went away
        finally:
            with self.lock:
                self.under_way -= 1

    def respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], mode: str) -> None:
        if mode == "hang":
            self.over.wait(30)
            return
        if mode in ("429", "500", "401", "404", "400"):
            text = json.dumps({"error": {"message": f"made up {mode}"}})
            self.send(handler, int(mode), text, {"Retry-After": "0.05"} if mode == "429" else {})
            return
        if mode == "html":
            self.send(handler, 200, "<html><body>Welcome</body></html>", {})
            return
        system, user = body["messages"][0]["content"], body["messages"][-1]["content"]
        if isinstance(user, list):
            user = user[-1]["text"]
        text = "I'm sorry, but I can't help with that." if mode == "refusal" else self.reply(system, user)
        used = sum(len(str(m["content"])) for m in body["messages"]) // 4, len(text) // 4 + 1
        with self.lock:
            self.tokens = [self.tokens[0] + used[0], self.tokens[1] + used[1]]
        message = {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": used[0], "completion_tokens": used[1]},
        }
        message_json = json.dumps(message)
        self.send(
            handler, 200, message_json[: len(message_json) // 2] if mode == "truncated" else message_json, {}
        )

    def send(self, handler: BaseHTTPRequestHandler, status: int, text: str, headers: dict[str, str]) -> None:
        data = text.encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    new_endpoint = Endpoint()
    yield new_endpoint
    new_endpoint.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[[int], Path]:
    return lambda count: annotations(tmp_path / "pictures.jsonl", count)
