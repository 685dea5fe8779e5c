"""What the server adds, and what it gives: streams at once against one after the other, cost per request.

    python benchmarks/over_http.py [--model random --quantize none] [--streams 32] [--rate 200] [--json FILE]

Two tables from real servers on real sockets, each a process of its own:

1. the given model ("random" is that of benchmarks/serve.py): `streams` different questions about pictures,
   asked one after the other and then all at once, each answer streamed to its end, tokens per second of both;
2. the server's own cost: a stand-in model of trivial size (one decoder layer of width 32, random weights,
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
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

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
                    found = json.loads(line)
                    if found["message"] == "listening":
                        break
            else:
                raise SystemExit("the server did not start")
            # Whoever does not read the log would stop the server when the pipe is full.
            with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL):
                try:
                    yield str(found["url"])
                finally:
                    process.terminate()
        finally:
            process.terminate()


def picture(seed: int) -> str:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
    made = io.BytesIO()
    small.resize((320, 240), Image.Resampling.BICUBIC).save(made, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(made.getvalue()).decode()}"


def question(number: int, tokens: int) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": picture(number)}},
        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
    ]
    messages = [{"role": "user", "content": content}]
    options = {"include_usage": True}
    return {"messages": messages, "max_tokens": tokens, "stream": True, "stream_options": options}


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, int]:
    """(answer, its tokens)."""
    text, tokens = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"]:
                text += event["choices"][0]["delta"].get("content") or ""
            elif event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return text, tokens


async def streams(url: str, count: int, tokens: int) -> dict[str, Any]:
    bodies = [question(number, tokens) for number in range(2 * count)]
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await stream(client, question(10**6, tokens))  # the first request warms up
        begun = time.perf_counter()
        alone = [await stream(client, body) for body in bodies[:count]]
        one_by_one = time.perf_counter() - begun
        begun = time.perf_counter()
        # Other pictures, so that nothing is remembered from before.
        together = await asyncio.gather(*(stream(client, body) for body in bodies[count:]))
        at_once = time.perf_counter() - begun
        again = await asyncio.gather(*(stream(client, body) for body in bodies[:count]))
    rates = [sum(n for _, n in found) / took for found, took in ((alone, one_by_one), (together, at_once))]
    same = sum(a[0] == b[0] for a, b in zip(alone, again, strict=True))
    return {
        "streams": count,
        "one by one, tokens/s": round(rates[0], 1),
        "at once, tokens/s": round(rates[1], 1),
        "times": round(rates[1] / rates[0], 2),
        "answers equal": f"{same} of {count}",
    }


def tiny(folder: Path, width: int = 32) -> Path:
    """A random model of one layer in a folder, so small that what surrounds it is what is measured."""
    import tokenizers
    import torch

    from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
    from pumice.model.llava import Llava
    from pumice.weights.folder import save

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
        head_width=16,
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
    headers = {"Content-Type": "application/json"}
    waits: list[float] = []
    statuses: dict[int, int] = {}
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def one(due: float | None) -> None:
            response = await client.post("/v1/chat/completions", content=content, headers=headers)
            if due is not None:
                waits.append(time.perf_counter() - due)
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

        await asyncio.gather(*(one(None) for _ in range(64)))  # connections and caches
        begun = time.perf_counter()
        tasks = []
        for number in range(int(rate * seconds)):
            due = begun + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - begun
    waits.sort()

    def percentile(share: float) -> float:
        return round(1000 * waits[min(len(waits) - 1, int(len(waits) * share / 100))], 2)

    found = {f"p{share:g}, ms": percentile(share) for share in (50, 90, 99, 99.9)}
    return {"requests": len(waits), "per second": round(len(waits) / took, 1), "statuses": statuses, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pumice-tiny", help='"random" is that of benchmarks/serve.py')
    parser.add_argument("--quantize", default="auto", help="as of pumice serve")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", choices=("streams", "cost"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    found: dict[str, Any] = {"cores": os.cpu_count()}
    if given.only != "cost":
        with tempfile.TemporaryDirectory() as folder:
            model = given.model
            if model == "random":
                from serve import random_model

                model = folder
                random_model(Path(folder))
            options = ["--slots", str(given.streams), "--quantize", given.quantize]
            with server(model, *options) as url:
                found["streams"] = asyncio.run(streams(url, given.streams, given.tokens))
        print(given.model, found["streams"])
    if given.only != "streams":
        with tempfile.TemporaryDirectory() as folder, server(str(tiny(Path(folder)))) as url:
            found["cost"] = asyncio.run(cost(url, given.rate, given.seconds))
        print("stand-in model", found["cost"])
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
