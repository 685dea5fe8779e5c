"""Random requests to a real server: wrong, huge and hard ones. Each gets its answer, and others in time."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import random
import re
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from targets import command, make_model, make_pictures, make_videos

from pumice.threads import busy_load, usable_cores

SECONDS = 2.0  # for a short request while others take long
MEMORY, PEAK = 2500, 5000  # MiB that the tiny model's server may take: docs/security.md has the sum
STATUSES = {200, 400, 404, 405, 408, 413, 415, 421, 429, 431, 504}
READ = (  # what is asked for without a body
    "/v1/models", "/v1/models/{}", "/api/tags", "/api/version", "/metrics", "/openapi.json", "/health", "/{}",
    "/page/{}", "/v1/{}", "/?a={}",
)  # fmt: skip
# What a field may become.
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, -(2**70), 1e300, 0.5, "", "a", "\ud800", "\0", "<|im_end|>",
    "<image>", "x" * 5000, [], {}, [[]], [None], {"a": 1}, {"$ref": "#"}, {"type": "object"}, ["a", 1],
    [1] * 300,     "data:image/png;base64,", "data:,", "http://127.0.0.1/", "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    {"type": "text", "text": "a"}, {"role": "user", "content": "a"}, {"type": "json_object"},
)  # fmt: skip
# What goes into the bytes of a request.
BYTES = (
    b"\r\n", b"\0", b"\xff", b" ", b":", b"9" * 30, b"a" * 70_000, b"PRI * HTTP/2.0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
    b"Expect: 100-continue\r\n", b"Content-Encoding: gzip\r\n", b"Content-Length: -1\r\n",
    b"Host: a\r\nHost: b\r\n", b"X-Request-Id: \t{}<b>\r\n",
)  # fmt: skip
TRACE = re.compile(r"Traceback|site-packages|/src/pumice|\.py\b|Error\(")


class Server:
    """`pumice serve` of a model, as a process."""

    def __init__(self, model: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            command("serve", "--model", model, "--name", "tiny", "--log", "json", "--port", "0", *options),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        while not self.url:
            assert self.process.poll() is None, self.log
            time.sleep(0.05)

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.log = [*self.log[-50:], line]
            with contextlib.suppress(ValueError):
                self.url = self.url or json.loads(line).get("url", "")

    def memory(self, kind: str = "VmRSS") -> int:
        """Return the memory of the process in MiB, or its peak, "VmHWM"; 0 where the system does not say."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(text.partition(f"{kind}:")[2].split()[0]) >> 10
        return 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def data_uri(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def requests_of(url: str, video: str) -> list[tuple[str, Any]]:
    """Return (path, right body) for every path and most fields; they are changed at random places."""
    data = url.partition(",")[2]
    image = {"type": "image_url", "image_url": {"url": url}}
    clip = {"type": "video_url", "video_url": {"url": video}}
    text = {"type": "text", "text": "What is it?"}
    user = {"role": "user", "content": [image, text]}
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
    function = {"name": "f", "description": "See.", "parameters": schema}
    tool = {"type": "function", "function": function}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [user, {"role": "assistant", "content": None, "tool_calls": [call]}]
    given = {"role": "tool", "tool_call_id": "c", "content": "1"}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    source = {"type": "base64", "media_type": "image/png", "data": data}
    turn = {"role": "user", "content": [{"type": "image", "source": source}, text]}
    use = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [text]}
    turns = [turn, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    shown = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}
    shown["content"] += [{"type": "input_image", "image_url": url}]
    items = [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "item_reference", "id": "msg_0"},
    ]
    chats = [
        {"model": "tiny", "messages": [user], "stream": True, "temperature": 1, "seed": 1},
        {"messages": [user], "n": 2, "logprobs": True, "top_logprobs": 2, "stop": ["a", "b"]},
        {"messages": [user], "tools": [tool], "tool_choice": "required", "parallel_tool_calls": True},
        {"messages": [user], "response_format": form, "stream": True},
        {"messages": [*called, given], "tools": [tool], "tool_choice": "auto"},
        {"messages": [{"role": "user", "content": [clip, text]}]},
        {"messages": [user, {"role": "assistant", "content": "A", "prefix": True}]},
        {"messages": [user], "guided_regex": "[ab]{1,3}"},
        {"messages": [user], "structured_outputs": {"choice": ["a", "b"]}},
        {"messages": [user], "guided_json": schema, "repetition_penalty": 1.3, "min_p": 0.1, "top_k": 4},
        {"messages": [user], "stream": True, "stream_options": {"include_usage": True}},
    ]
    tools = [{"type": "function", "name": "f", "parameters": schema}]
    asked = {"role": "user", "content": "a", "images": [data]}
    return [
        *(("/v1/chat/completions", {"max_tokens": 4, **chat}) for chat in chats),
        ("/v1/completions", {"prompt": "A dog", "max_tokens": 4, "echo": True, "stop": "x"}),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 2, "logprobs": 1, "n": 2}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "guided_choice": ["a"]}),
        ("/v1/responses", {"input": [shown, *items[:2]], "max_output_tokens": 16, "instructions": "b"}),
        ("/v1/responses", {"input": [shown], "tools": tools, "tool_choice": "required", "stream": True}),
        ("/v1/responses", {"input": "a", "text": {"format": {**form["json_schema"], "type": form["type"]}}}),
        ("/v1/responses", {"input": [items[2], shown], "store": True, "metadata": {"a": "b"}}),
        ("/v1/messages", {"messages": [turn], "max_tokens": 3, "stop_sequences": ["x"], "system": "b"}),
        (
            "/v1/messages",
            {
                "messages": turns,
                "max_tokens": 3, "stream": True, "tool_choice": {"type": "tool", "name": "f"},
                "tools": [{"name": "f", "input_schema": schema}],
            },
        ),
        ("/api/generate", {"model": "tiny", "prompt": "a", "images": [data], "options": {"num_predict": 2}}),
        ("/api/chat", {"model": "tiny", "messages": [asked], "tools": [tool]}),
        ("/api/chat", {"model": "tiny", "messages": [asked], "format": schema, "stream": False}),
        ("/api/show", {"model": "tiny", "verbose": True}),
        ("/explain", {"messages": [user, {"role": "assistant", "content": "A dog."}]}),
        ("/boxes", {"text": "A dog [0.1, 0.2, 0.3, 0.4].", "width": 64, "height": 48, "pictures": 1}),
    ]  # fmt: skip


def change(draw: random.Random, value: Any) -> Any:
    """Return the value with a random change at a random place."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, draw.choice(("banana", "", key * 2, "x" * 3000)): draw.choice(VALUES)}
        return {**value, key: change(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return value * draw.choice((0, 2, 40))
        return [*value[:place], change(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and len(value) > 100 and draw.random() < 0.8:  # a picture
        place = draw.randrange(len(value))
        return (
            value[:place]
            + draw.choice(("", "A", "=", "\n", "-", "é")) * draw.randint(0, 9)
            + value[place + 9 :]
        )
    return draw.choice(VALUES)


def problem_of(response: httpx.Response) -> str:
    """Return what is wrong with an answer, or ""."""
    text = response.text
    if response.status_code not in STATUSES:
        return f"status {response.status_code}: {text[:200]}"
    if TRACE.search(text) and response.status_code != 200:
        return f"a trace: {text[:300]}"
    if response.status_code == 200:
        return ""
    if len(text) > 3000:
        return f"an error of {len(text)} characters"
    try:
        return "" if response.json()["error"] else "an empty error"
    except (ValueError, KeyError, TypeError):
        return f"no error in JSON: {text[:200]}"


def attack(folder: Path) -> Iterator[Callable[[random.Random], str]]:
    """Right requests with random changes, and bytes that are no requests."""
    model = make_model(folder / "model")
    pictures = list(map(data_uri, make_pictures(folder / "pictures")))
    videos = list(map(data_uri, make_videos(folder / "videos")))
    server = Server(model, "--timeout", "20", "--body-timeout", "5")
    try:
        while True:
            yield functools.partial(_request, server, pictures, videos)
    finally:
        server.end()


def _request(server: Server, pictures: list[str], videos: list[str], draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.15:
        problem = _bytes(server, draw)
    elif kind < 0.2:
        problem = _read(server, draw)
    else:
        requests = requests_of(draw.choice(pictures), draw.choice(videos))
        path, body = draw.choice(requests)
        if draw.random() < 0.1:
            path = draw.choice(requests)[0]
        for _ in range(draw.choice((0, 1, 1, 2, 3))):
            body = change(draw, body)
        data = json.dumps(body).encode()
        if draw.random() < 0.1:
            place = draw.randrange(len(data))
            data = data[:place] + draw.randbytes(draw.randrange(9)) + data[place + draw.randrange(9) :]
        headers = {"Content-Type": draw.choice(("application/json",) * 9 + ("text/plain", "", "x" * 999))}
        try:
            problem = problem_of(httpx.post(server.url + path, content=data, headers=headers, timeout=60))
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        problem = problem and f"{path}: {problem} -- {data[:200]!r}"
    return problem or _alive(server)


def _read(server: Server, draw: random.Random) -> str:
    """Ask for what needs no body, with strange names and another method now and then."""
    name = draw.choice(("tiny", "", "..%2f..%2fetc%2fpasswd", "%00", "x" * 5000, "%ff", "a/b", "%ed%a0%80"))
    path, method = draw.choice(READ).format(name), draw.choice(("GET",) * 4 + ("POST", "DELETE", "HEAD"))
    response = httpx.request(method, server.url + path, timeout=60)
    if method == "HEAD" or response.status_code == 200:
        return "" if response.status_code < 500 else f"{method} {path}: {response.status_code}"
    return problem_of(response)


def _bytes(server: Server, draw: random.Random) -> str:
    """Send bytes that are nearly HTTP. The server may close the connection, and lives on."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    data = bytearray(head + b'Content-Length: 14\r\n\r\n{"prompt":"a"}')
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(data))
        data[place : place + draw.randrange(4)] = draw.choice(BYTES)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.settimeout(0.3)
        with contextlib.suppress(OSError):
            connection.sendall(data)
            answer = connection.recv(1 << 16)
            if TRACE.search(answer.decode("latin-1")) or b" 500 " in answer[:20]:
                return f"{answer[:200]!r} for {bytes(data[:300])!r}"
    return ""


def _alive(server: Server) -> str:
    if server.process.poll() is not None:
        return f"the server ended: {server.log[-3:]}"
    begun = time.monotonic()
    status = httpx.get(f"{server.url}/health", timeout=60).status_code
    if status != 200 or time.monotonic() - begun > time_limit():
        return f"/health: {status} after {time.monotonic() - begun:.1f} s"
    now, peak = server.memory(), server.memory("VmHWM")
    return f"the server takes {now} MiB, {peak} at its peak" if now > MEMORY or peak > PEAK else ""


def time_limit() -> float:
    """Return how long a short request may take now: longer in proportion on a machine with other work."""
    return SECONDS * (1 + busy_load() / usable_cores())


def enormous_png(side: int) -> str:
    """A data URI of a PNG of one colour with so many pixels a side: some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(side + 1) * side)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()


def hard_requests(draw: random.Random) -> tuple[str, Any]:
    """Return the path and the body of a request that takes as much as it can."""
    text = draw.choice(("word ", "a", " ", "é猫", "\n", "?!,:", "9")) * draw.choice((10**4, 10**6, 4 * 10**6))
    message = {"role": "user", "content": text}
    letters = draw.sample("abcdefghijklmnopqrstuvwxyz", draw.randint(8, 24))
    hard = {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in letters]}
    deep: Any = {"type": "string"}
    for _ in range(draw.choice((10, 40, 3000))):
        deep = {"type": "array", "items": deep}
    wide = {
        "type": "object",
        "properties": {f"p{n}": {"type": "string"} for n in range(draw.choice((99, 3000)))},
    }
    schema = draw.choice((hard, deep, wide, {"type": "string", "pattern": "(a|b|c){1,500}" * 9}))
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": schema}} for n in range(9)]
    png = enormous_png(draw.choice((500, 3000, 7000, 9000)))
    images = [{"type": "image_url", "image_url": {"url": png}}] * draw.choice((1, 4, 16))
    shown = {"role": "user", "content": [*images, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "dog " * draw.choice((3, 120, 500, 3000))}
    short = {"role": "user", "content": "a"}
    return draw.choice((
        ("/v1/chat/completions", {"messages": [message]}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [1] * draw.choice((10**4, 10**6))}),
        ("/v1/completions", {"prompt": ["a"] * 16, "n": 8, "max_tokens": 200, "logprobs": 5}),
        ("/v1/chat/completions", {"messages": [short], "response_format": form}),
        ("/v1/chat/completions", {"messages": [short], "tools": tools, "tool_choice": "required"}),
        ("/v1/chat/completions", {"messages": [shown], "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [short], "model": text}),
        ("/v1/chat/completions", {"messages": [short], "metadata": {str(n): "" for n in range(10**5)}}),
        ("/explain", {"messages": [shown, answer]}),
    ))  # fmt: skip


def loads(folder: Path) -> Iterator[Callable[[random.Random], str]]:
    """Hard requests at once, some of whose clients leave; a short request beside them is answered in time."""
    model = make_model(folder / "model")
    server = Server(model, "--timeout", "20")
    try:
        while True:
            yield functools.partial(_load, server)
    finally:
        server.end()


def _load(server: Server, draw: random.Random) -> str:
    problems: list[str] = []

    def send(path: str, body: Any, leave: float) -> None:
        try:
            problem = problem_of(httpx.post(server.url + path, json=body, timeout=leave))
        except httpx.TimeoutException:
            problem = "" if leave < 10 else "no answer within 60 s"
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            problems.append(f"{path}: {problem}")

    requests = [
        (*hard_requests(draw), draw.choice((0.5, 3.0, 60.0, 60.0))) for _ in range(draw.randint(2, 8))
    ]
    senders = [threading.Thread(target=send, args=request) for request in requests]
    for sender in senders:
        sender.start()
    with httpx.Client(timeout=60) as client:
        while any(sender.is_alive() for sender in senders):
            begun = time.monotonic()
            status = client.get(f"{server.url}/health").status_code
            took = time.monotonic() - begun
            if status != 200 or took > time_limit():
                problems.append(f"/health: {status} after {took:.1f} s")
            time.sleep(0.05)
    return "; ".join(problems) or _alive(server)
