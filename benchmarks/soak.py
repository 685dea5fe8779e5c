"""Load a server for ten minutes: whole and streamed answers, clients that leave, bad requests, floods.

    python benchmarks/soak.py [--minutes 10] [--clients 12] [--json FILE]

A tiny random model is served by `pumice serve`; every whole answer is compared with one that is computed
beforehand: without a cache, or for a beam search, which needs the engine, with nothing beside it. Fails
(status 1) on a 5xx, on an answer that differs, on a status that was not expected, on memory that still grows
after the warm-up (the first quarter), or when the last drain does not end with status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from over_http import tiny
from PIL import Image

from pumice.serve.backend import conversation
from pumice.serve.protocol import ChatRequest

SLOTS, QUEUE, CACHE = 4, 8, 1500  # so small that prefixes are evicted and the queue fills
SLEEP = 20.0  # seconds
GROWTH = 1.1  # of the resident memory after the warm-up


def picture(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (24 + seed, 32, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def message(text: str, *pictures: bytes) -> dict[str, Any]:
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in pictures]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def catalogue(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Requests and what the model answers to them alone."""
    from pumice.assistant import load
    from pumice.engine.generate import naive_generate

    exact = load(folder, device="cpu", quantize=None)
    chosen = random.Random(0)
    cases = []
    for number in range(24):
        shown = [picture(chosen.randrange(6)) for _ in range(number % 3)]
        messages = [message(f"What is number {number % 8}?", *shown)]
        if number % 4 == 3:
            messages += [{"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Sure?"}]
        body: dict[str, Any] = {"messages": messages, "max_tokens": 4 + number % 13}
        if number % 5 == 4:
            body |= {"temperature": 1.2, "top_p": 0.9, "seed": number}
        elif number % 5 == 2:
            body |= {"num_beams": 3, "length_penalty": 0.5}
        asked = ChatRequest.model_validate(body)
        sampling = {key: value for key, value in body.items() if key not in ("messages", "max_tokens")}
        sampling["max_new_tokens"] = body["max_tokens"]
        files = {param: base64.b64decode(image.url.partition(",")[2]) for param, image in asked.images}
        question = conversation(asked, files, exact.processor.template)
        if "num_beams" in body:
            answer = "".join(exact.stream(question, **sampling))
        else:
            prompt = exact.prompt(question, num_beams=1, **sampling)
            answer = exact.processor.tokenizer.decode(naive_generate(exact.model, prompt))
        cases.append((body, answer))
    return cases


class Soak:
    def __init__(self, url: str, cases: list[tuple[dict[str, Any], str]], end: float) -> None:
        self.url, self.cases, self.end = url, cases, end
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.compared = 0
        self.slept: list[float] = []  # when this process was found to have been stopped for a while

    async def watch(self) -> None:
        """Notice when the machine sleeps: idle connections are over then, which is no fault of the server."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(1)
            if time.monotonic() - before > SLEEP:
                self.slept.append(time.monotonic())

    async def client(self, number: int) -> None:
        chosen = random.Random(number)
        kinds = (
            [self.whole] * 5 + [self.streamed] * 5 + [self.leaves] * 4 + [self.nonsense] * 3 + [self.flood]
        )
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.end:
                kind = chosen.choice(kinds)
                try:
                    await kind(client, chosen)
                except httpx.HTTPError as error:
                    await asyncio.sleep(3)  # so that `watch` has looked
                    if self.slept and time.monotonic() - self.slept[-1] < 2 * SLEEP:
                        self.statuses["lost in the machine's sleep"] += 1
                    else:
                        self.wrong.append(f"{kind.__name__}: {error!r}")

    def note(self, kind: str, status: int, *expected: int) -> bool:
        self.statuses[f"{kind} {status}"] += 1
        if status >= 500 or status not in (*expected, 429):
            self.wrong.append(f"{kind}: status {status}")
        return status == 200

    def compare(self, answer: str, expected: str) -> None:
        self.compared += 1
        if answer != expected:
            self.wrong.append(f"answered {answer!r}, the model says {expected!r}")

    async def whole(self, client: httpx.AsyncClient, chosen: random.Random) -> None:
        body, expected = chosen.choice(self.cases)
        response = await client.post("/v1/chat/completions", json=body)
        if self.note("whole", response.status_code, 200):
            self.compare(response.json()["choices"][0]["message"]["content"], expected)
        else:
            await asyncio.sleep(chosen.random())

    async def streamed(self, client: httpx.AsyncClient, chosen: random.Random) -> None:
        body, expected = chosen.choice(self.cases)
        text, ended = "", False
        async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if not self.note("streamed", response.status_code, 200):
                return
            async for line in response.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        if not ended:
            self.wrong.append("a stream without an end")
        self.compare(text, expected)

    async def leaves(self, client: httpx.AsyncClient, chosen: random.Random) -> None:
        body = {**chosen.choice(self.cases)[0], "max_tokens": 200, "stream": chosen.random() < 0.5}
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(client.post("/v1/chat/completions", json=body), 0.2 * chosen.random())
        self.statuses["left"] += 1

    async def nonsense(self, client: httpx.AsyncClient, chosen: random.Random) -> None:
        good = chosen.choice(self.cases)[0]
        bad_picture = {**good, "messages": [message("What?", picture(1)[: chosen.randrange(120)])]}
        too_long = {**good, "messages": [message("long " * 400)]}
        wrong: list[Any] = [
            bad_picture,
            too_long,
            {**good, "n": 999},
            {**good, "tools": [{}]},
            [],
            7,
            {"messages": "x"},
        ]
        response = await client.post("/v1/chat/completions", json=chosen.choice(wrong))
        self.note("nonsense", response.status_code, 400)
        if response.status_code == 400 and not response.json()["error"]["message"]:
            self.wrong.append("a refusal without a reason")

    async def flood(self, client: httpx.AsyncClient, chosen: random.Random) -> None:
        body = chosen.choice(self.cases)[0]
        asked = (client.post("/v1/chat/completions", json=body) for _ in range(2 * (SLOTS + QUEUE)))
        for response in await asyncio.gather(*asked):
            self.note("flood", response.status_code, 200)
        await asyncio.sleep(chosen.random())

    async def run(self, clients: int) -> None:
        watching = asyncio.create_task(self.watch())
        await asyncio.gather(*(self.client(number) for number in range(clients)))
        watching.cancel()


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = tiny(Path(name))
        cases = catalogue(folder)
        options = [
            "--port",
            "0",
            "--slots",
            SLOTS,
            "--queue",
            QUEUE,
            "--cache-tokens",
            CACHE,
            "--log",
            "json",
        ]
        options += ["--device", "cpu", "--quantize", "none"]  # exact, so that answers can be compared
        options += ["--body-timeout", 600]  # a machine that sleeps for a while is no fault of the server
        log = Path(name) / "log"
        with log.open("w", encoding="utf-8") as file:
            command = [sys.executable, "-m", "pumice", "serve", "--model", folder, *options]
            process = subprocess.Popen([str(word) for word in command], stderr=file)
            try:
                report = _soak(process, log, cases, arguments)
            finally:
                process.kill()
                process.wait()
        traces = sum('"trace"' in line for line in log.read_text(encoding="utf-8").splitlines())
    report["traces in the log"] = traces
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["wrong"] or traces or report["drain"] != 0 or report["memory growth"] > GROWTH:
        raise SystemExit(1)


def _soak(process: subprocess.Popen[bytes], log: Path, cases: list[Any], arguments: Any) -> dict[str, Any]:
    url = ""
    while not url:
        if process.poll() is not None:
            raise SystemExit(log.read_text(encoding="utf-8"))
        lines = [
            json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")
        ]
        url = next((line["url"] for line in lines if line["message"] == "listening"), "")
        time.sleep(0.1)
    seconds = 60 * arguments.minutes
    memory: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds / 200):
            memory.append(resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    soak = Soak(url, cases, time.monotonic() + seconds)
    try:
        asyncio.run(soak.run(arguments.clients))
    finally:
        over.set()
        watcher.join()
    process.send_signal(signal.SIGTERM)
    drain = process.wait(60)
    quarter = len(memory) // 4
    warm, last = max(memory[quarter : 2 * quarter]), max(memory[-quarter:])
    return {
        "minutes": arguments.minutes,
        "requests": dict(sorted(soak.statuses.items())),
        "answers compared": soak.compared,
        "times the machine slept": len(soak.slept),
        "wrong": soak.wrong[:20],
        "memory after the warm-up, MB": round(warm / 1e6),
        "memory at the end, MB": round(last / 1e6),
        "memory growth": round(last / warm, 3),
        "drain": drain,
    }


if __name__ == "__main__":
    main()
