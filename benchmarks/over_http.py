"""Measure the server: concurrent against sequential streams, many clients, and the cost of one request.

    python benchmarks/over_http.py [--model random --quantize none] [--streams 32] [--rate 200] [--json FILE]

Three tables from real servers on real sockets, each a process of its own:

1. the given model ("random" is that of benchmarks/serve.py): `streams` different questions, each about a
   picture of its own, asked one after the other and then all at once, each answer streamed to its end, tokens
   per second of both;
2. the same model under load, with the default slots and queue: 16 clients stream answer after answer for
   30 s, then 100 requests come at once, more than the queue holds: what they get, and when those that are
   refused are told to come back;
3. the server's own cost: a stand-in model of trivial size (one decoder layer of width 32, random weights,
   answers of one token), asked `rate` times a second for `seconds`: what is left is HTTP, JSON, checks, the
   prompt, the queue between threads. A request is due at its own time whatever became of the others, so
   that waiting counts (no coordinated omission).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pumice.threads import usable_cores

QUESTIONS = (
    "What is in the picture?",
    "Describe the colours.",
    "What is on the left?",
    "Is there an animal?",
)


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """`pumice serve` on a free port; gives its address."""
    command = [
        sys.executable,
        "-m",
        "pumice",
        "serve",
        "--model",
        model,
        "--port",
        "0",
        "--log",
        "json",
        *options,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event["message"] == "listening":
                        break
            else:
                raise SystemExit("the server did not start")
            # Whoever does not read the log would stop the server when the pipe is full.
            with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL):
                try:
                    yield str(event["url"])
                finally:
                    process.terminate()
        finally:
            process.terminate()


def picture(seed: int) -> str:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def question(number: int, tokens: int, pictures: bool) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    if pictures:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture(number)}})
    else:
        content[0]["text"] += f" Number {number}."
    messages = [{"role": "user", "content": content}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"messages": messages, "max_tokens": tokens, "num_beams": 1, **options}  # greedy


class Connection:
    """A kept connection. A client of little cost, because it shares the cores with the server."""

    def __init__(self, url: str) -> None:
        self.host, self.port = url.removeprefix("http://").split(":")

    async def open(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection(self.host, int(self.port))
        return self

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """(status, the whole answer). `retry_after` is what its header says, in seconds."""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        headers = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        status = int(headers.split(b" ", 2)[1])
        told = headers.partition(b"retry-after:")[2]
        self.retry_after = int(told.split(b"\r\n")[0]) if told else None
        _, header, length = headers.partition(b"content-length:")
        if header:
            return status, await self.reader.readexactly(int(length.split(b"\r\n")[0]))
        pieces = []
        while size := int(await self.reader.readline(), 16):  # transfer-encoding: chunked
            pieces.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readline()
        return status, b"".join(pieces)


async def stream(url: str, body: dict[str, Any]) -> tuple[str, int]:
    """(answer, its tokens)."""
    connection = await Connection(url).open()
    status, answer = await connection.post(json.dumps(body).encode())
    connection.writer.close()
    events = [json.loads(line[6:]) for line in answer.decode().split("\n") if line.startswith("data: {")]
    if status != 200 or "usage" not in events[-1]:
        raise SystemExit(f"status {status}: {answer.decode()}")
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    return text, events[-1]["usage"]["completion_tokens"]


async def streams(url: str, count: int, tokens: int, pictures: bool) -> dict[str, Any]:
    bodies = [question(number, tokens, pictures) for number in range(2 * count)]
    await stream(url, question(10**6, tokens, pictures))  # the first request warms up
    started = time.perf_counter()
    alone = [await stream(url, body) for body in bodies[:count]]
    one_by_one = time.perf_counter() - started
    started = time.perf_counter()
    # Other questions, so that nothing is remembered from before.
    together = await asyncio.gather(*(stream(url, body) for body in bodies[count:]))
    at_once = time.perf_counter() - started
    again = await asyncio.gather(*(stream(url, body) for body in bodies[:count]))
    rates = [
        sum(n for _, n in answers) / took for answers, took in ((alone, one_by_one), (together, at_once))
    ]
    same = sum(a[0] == b[0] for a, b in zip(alone, again, strict=True))
    return {
        "streams": count,
        "one by one, tokens/s": round(rates[0], 1),
        "at once, tokens/s": round(rates[1], 1),
        "times": round(rates[1] / rates[0], 2),
        "answers equal": f"{same} of {count}",
    }


CLIENTS, LOAD_SECONDS, AT_ONCE = 16, 30.0, 100


async def load(url: str, tokens: int, pictures: bool) -> dict[str, Any]:
    """Many clients that stream for a while; then more at once than the queue holds."""
    await stream(url, question(10**6, tokens, pictures))  # the first request warms up
    began = time.perf_counter()
    counts: list[int] = []
    waits: list[float] = []
    numbers = itertools.count()

    async def client() -> None:
        while (asked := time.perf_counter()) - began < LOAD_SECONDS:
            counts.append((await stream(url, question(next(numbers), tokens, pictures)))[1])
            waits.append(time.perf_counter() - asked)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))  # whatever is not answered ends the run
    took = time.perf_counter() - began
    statuses: dict[int, int] = {}
    told: set[int] = set()

    async def at_once(number: int) -> None:
        connection = await Connection(url).open()
        body = json.dumps(question(10**5 + number, tokens, pictures)).encode()
        status, answer = await connection.post(body)
        connection.writer.close()
        statuses[status] = statuses.get(status, 0) + 1
        if status == 429 and connection.retry_after is not None:
            told.add(connection.retry_after)
        elif not answer.endswith(b"data: [DONE]\n\n"):
            raise SystemExit(f"status {status}: {answer.decode()}")

    began = time.perf_counter()
    await asyncio.gather(*map(at_once, range(AT_ONCE)))
    waits.sort()
    return {
        f"answers of {CLIENTS} clients": len(counts),
        "tokens/s": round(sum(counts) / took, 1),
        "p50, s": round(waits[len(waits) // 2], 2),
        "longest, s": round(waits[-1], 2),
        f"{AT_ONCE} at once": statuses,
        "Retry-After, s": sorted(told),
        "all answered, s": round(time.perf_counter() - began, 1),
    }


def tiny(folder: Path, width: int = 32) -> Path:
    """A random model of one layer in a folder, so small that what surrounds it is what is measured."""
    import tokenizers
    import torch

    from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
    from pumice.formats.pumice.folder import save
    from pumice.model.llava import Llava

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system What is in the picture?"] * 4, trainer)
    decoder = DecoderConfig(
        vocab_size=320,
        width=width,
        depth=1,
        heads=2,
        kv_heads=1,
        head_dim=16,
        mlp_width=width,
        context=512,
        tied_head=True,
    )
    config = ModelConfig(
        decoder=decoder,
        vision=VisionConfig(image_size=64, variant="lite0"),
        connector=ConnectorConfig(kind="linear"),
        template="chatml",
        stop_token_ids=(2,),
    )
    torch.manual_seed(0)
    model = Llava(config)
    for parameter in model.decoder.parameters():
        if parameter.dim() == 2:  # weights so large that it says something else at every step
            torch.nn.init.normal_(parameter, std=0.3)
    path = folder / "tiny"
    save(path, config, model.state_dict(), tokenizer=tokenizer.to_str())
    return path


async def cost(url: str, rate: int, seconds: float) -> dict[str, Any]:
    """Latencies of a text question at a steady rate, from the time at which each was due."""
    body = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 1}
    content = json.dumps(body).encode()
    waits: list[float] = []
    statuses: dict[int, int] = {}
    free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
    for _ in range(64):
        free.put_nowait(await Connection(url).open())

    async def one(due: float) -> None:
        connection = await free.get()
        status, _ = await connection.post(content)
        waits.append(time.perf_counter() - due)
        statuses[status] = statuses.get(status, 0) + 1
        free.put_nowait(connection)

    async def steadily(seconds: float) -> float:
        started = time.perf_counter()
        tasks = []
        for number in range(int(rate * seconds)):
            due = started + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
        return time.perf_counter() - started

    await steadily(2)  # caches
    waits.clear()
    statuses.clear()
    took = await steadily(seconds)
    waits.sort()

    def percentile(share: float) -> float:
        return round(1000 * waits[min(len(waits) - 1, int(len(waits) * share / 100))], 2)

    percentiles = {f"p{share:g}, ms": percentile(share) for share in (50, 90, 99, 99.9)}
    return {
        "requests": len(waits),
        "per second": round(len(waits) / took, 1),
        "statuses": statuses,
        **percentiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pumice-tiny", help='"random" is that of benchmarks/serve.py')
    parser.add_argument("--quantize", default="auto", help="as of pumice serve")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--without-pictures", action="store_true", help="streams answer text alone")
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", choices=("streams", "load", "cost"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    figures: dict[str, Any] = {"cores": usable_cores()}
    wanted = (arguments.only,) if arguments.only else ("streams", "load", "cost")
    with tempfile.TemporaryDirectory() as folder:
        model, shown = arguments.model, not arguments.without_pictures
        if model == "random" and wanted != ("cost",):
            from serve import random_model

            model = str(Path(folder) / "random")
            random_model(Path(model))
        options = ("--quantize", arguments.quantize)
        if "streams" in wanted:
            with server(model, "--slots", str(arguments.streams), *options) as url:
                asked = streams(url, arguments.streams, arguments.tokens, shown)
                figures["streams"] = asyncio.run(asked)
            print(arguments.model, figures["streams"])
        if "load" in wanted:
            with server(model, *options) as url:
                figures["load"] = asyncio.run(load(url, arguments.tokens, shown))
            print(arguments.model, figures["load"])
        if "cost" in wanted:
            with server(str(tiny(Path(folder)))) as url:
                figures["cost"] = asyncio.run(cost(url, arguments.rate, arguments.seconds))
            print("stand-in model", figures["cost"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
