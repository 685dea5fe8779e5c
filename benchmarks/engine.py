"""Measure the engine around the model at LLaVA's sizes: cache, prefixes, sampling, attention.

    python benchmarks/engine.py [--only picture,load,lookup,sampling,attention,tables] [--processor-time]

`picture` and `load` run the scheduler alone, with the cache that a 7B of 4 bits gets on a machine of 24 GB.
`sampling` draws from random logits. `attention` decodes a token with a few layers of a 7B's, a 3B's and a
1B's proportions, whose weights are a part of the time that is subtracted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from pumice.config import DecoderConfig
from pumice.engine.cache import PrefixCache
from pumice.engine.engine import KEPT_FREED_BYTES
from pumice.engine.native import NativeDecoder, native_decoder
from pumice.engine.params import SamplingParams
from pumice.engine.requests import Prompt, Request
from pumice.engine.sampling import sample
from pumice.engine.scheduler import Scheduler
from pumice.kernels.allocator import keep_freed_memory
from pumice.kernels.packed import BlockFormat, PackedMatrix, packed_size
from pumice.model.cache import BLOCK, KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.quantized import kind_of, swap
from pumice.threads import usable_cores

CLOCK = [time.perf_counter]
TOKEN_BYTES = 2 * 32 * 32 * 128 * 2  # keys and values of a 7B's token in bf16
WEIGHTS, MEMORY = 4.9e9, 24e9  # a 7B of 4 bits with its tower
DEFAULT_CACHE = int((MEMORY - WEIGHTS) / 2 // TOKEN_BYTES)
PICTURE = 2880  # tokens of a LLaVA-1.6 picture


def request(ids: list[int], answer: int) -> Request:
    prompt = Prompt(torch.tensor(ids), params=SamplingParams(max_new_tokens=answer))
    return Request(prompt, lambda delta: None, torch.Generator(), len(ids) + answer - 1)


def simulate(requests: list[Request], cache_tokens: int, slots: int = 16) -> tuple[int, int]:
    """Run the scheduler until all requests end. Return the tokens computed, and those of the first prompt's
    first `PICTURE` positions."""
    cache = PrefixCache(-(-cache_tokens // BLOCK), BLOCK, lambda source, target, count: None)
    scheduler = Scheduler(slots, 512, cache)
    scheduler.waiting.extend(requests)
    computed = in_picture = 0
    while plan := scheduler.plan():
        for one, count in plan:
            assert one.slot is not None
            computed += count
            in_picture += max(0, min(PICTURE, one.slot.length + count) - one.slot.length)
            cache.record(one.slot, one.token_hashes[: one.slot.length + count])
        for one, _ in plan:
            if one.remaining == 0:
                one.append(random.randrange(30_000))
                if one.length > one.max_cells:
                    scheduler.remove(one)
    return computed, in_picture


def picture() -> None:
    head = [random.randrange(30_000) for _ in range(PICTURE)]
    asked = [request(head + [random.randrange(30_000) for _ in range(30)], 64) for _ in range(16)]
    _, in_picture = simulate(asked, DEFAULT_CACHE)
    print(f"16 questions about one picture: {in_picture / PICTURE:.2f} pictures computed")


def load() -> None:
    for cache_tokens in (DEFAULT_CACHE, 4096):
        for answer in (256, 512):
            asked = [request([random.randrange(30_000) for _ in range(600)], answer) for _ in range(64)]
            needed = sum(one.max_cells for one in asked)
            computed, _ = simulate(asked, cache_tokens)
            print(
                f"64 prompts of 600 tokens, answers of {answer}, 16 slots, cache of {cache_tokens}: "
                f"{computed / needed:.3f} tokens computed for each that is needed"
            )


def lookup() -> None:
    for count in (100, 10_000):
        cache = PrefixCache(count * 12, BLOCK, lambda source, target, tokens: None)
        draw = np.random.default_rng(0)
        head = draw.integers(0, 30_000, 40)
        for _ in range(count):  # all begin with the same 40 tokens
            hashes = np.concatenate((head, draw.integers(0, 30_000, 600)))
            slot = cache.open(hashes, cache.match(hashes[:-1]), len(hashes))
            assert slot is not None
            cache.record(slot, hashes)
            cache.release(slot)
        times = []
        for _ in range(50):
            fresh = np.concatenate((hashes[:600], draw.integers(0, 30_000, 40)))
            start = time.perf_counter()
            slot = cache.open(fresh, cache.match(fresh[:-1]), len(fresh))
            assert slot is not None
            cache.record(slot, fresh)
            cache.release(slot)
            times.append(time.perf_counter() - start)
        print(f"{count} prefixes cached: {1e3 * statistics.median(times):.2f} ms for a request of 640 tokens")


def sampling() -> None:
    for vocabulary in (49_000, 152_000):
        logits = torch.randn(16, vocabulary) * 3
        params = [SamplingParams(temperature=1, top_p=0.9)] * 16
        generators = [torch.Generator().manual_seed(n) for n in range(16)]
        history = [np.arange(600)] * 16
        seconds = best(sample, logits, params, history, generators)
        print(f"top_p 0.9, {vocabulary} words, 16 requests: {1e3 * seconds:.1f} ms in all")


def best(function: Callable[..., object], *arguments: object, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        start = CLOCK[-1]()
        function(*arguments)
        times.append(CLOCK[-1]() - start)
    return min(times)


SHAPES = {"7B": (4096, 32, 32, 11008), "3B": (3072, 24, 8, 8192), "1B": (2048, 32, 4, 5632)}


def decoder(name: str, depth: int, context: int) -> tuple[Decoder, KVCache, NativeDecoder]:
    """Packed layers without meaning: their numbers do not change how long they take."""
    width, heads, kv_heads, mlp_width = SHAPES[name]
    config = DecoderConfig(
        vocab_size=512, width=width, depth=depth, heads=heads, kv_heads=kv_heads, head_dim=width // heads,
        mlp_width=mlp_width, context=context,
    )  # fmt: skip
    with torch.device("meta"):
        model = Decoder(config)

    def packed(name: str, weight: torch.Tensor) -> PackedMatrix:
        kind: BlockFormat = kind_of("int4", name, weight.shape[1])
        data = torch.zeros(packed_size(kind, *weight.shape), dtype=torch.uint8)
        return PackedMatrix(kind, weight.shape[0], weight.shape[1], data)

    swap(model, packed)
    for part in model.modules():
        for name_, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(part, name_, torch.nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
    cache = KVCache(config, context, torch.device("cpu"), torch.bfloat16)
    cache.keys.normal_()
    cache.values.normal_()
    native = native_decoder(model, cache)
    assert native is not None
    return model, cache, native


def attention() -> None:
    context = 4032
    rate = read_rate()
    print(f"memory: {rate / 1e9:.1f} GB/s are read")
    for name in SHAPES:
        depth = 8
        model, cache, native = decoder(name, depth, context + BLOCK)
        x = torch.ones(1, model.config.width)
        table = list(range(cache.blocks))
        random.shuffle(table)
        with torch.inference_mode():
            far = best(native.logits, x, [Segment(table, context, 1)], [])
            near = best(native.logits, x, [Segment(table, 0, 1)], [])
        read = context * KVCache.bytes_per_token(model.config, torch.bfloat16)
        print(
            f"{name}: keys and values of {context} tokens at {read / (far - near) / 1e9:.1f} GB/s, "
            f"{(far - near) / depth * 1e3:.2f} ms a layer; weights {near / depth * 1e3:.2f} ms a layer"
        )


def attend(cache: KVCache, table: list[int], queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return cache.attend([Segment(table, PICTURE, queries.shape[2])])(0, queries, keys, keys)


def tables() -> None:
    """One layer's attention with blocks that lie together and anywhere, and what a copy of a prefix costs."""
    for name in ("7B", "1B"):
        width, heads, kv_heads, _ = SHAPES[name]
        _, cache, native = decoder(name, 1, PICTURE * 2 + 512)
        together = list(range(cache.blocks))
        anywhere = random.sample(together, len(together))
        queries = torch.randn(1, heads, 512, width // heads)
        keys = torch.randn(1, kv_heads, 512, width // heads)
        x = torch.ones(1, width)
        with torch.inference_mode():
            for kind, table in (("together", together), ("anywhere", anywhere)):
                prompt, token = (
                    best(attend, cache, table, queries, keys, rounds=3),
                    best(attend, cache, table, queries[:, :, :1], keys[:, :, :1]),
                )
                compiled = best(native.logits, x, [Segment(table, PICTURE, 1)], [])
                print(
                    f"{name}, blocks {kind}: 512 tokens after {PICTURE} {1e3 * prompt:.1f} ms a layer, "
                    f"one {1e3 * token:.2f} ms, {1e3 * compiled:.2f} ms in compiled code with products"
                )
            half = PICTURE * width // heads
            numbers = cache.keys.flatten(2)
            seconds = best(numbers[:, :, half : 2 * half].copy_, numbers[:, :, :half])
            print(f"{name}: copying {PICTURE} tokens {2e3 * seconds:.2f} ms a layer")


def read_rate() -> float:
    data = torch.ones(1 << 28, dtype=torch.float32)
    return data.nbytes / best(data.sum)


PARTS = {
    "picture": picture,
    "load": load,
    "lookup": lookup,
    "sampling": sampling,
    "attention": attention,
    "tables": tables,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--processor-time", action="store_true", help="where other work runs on the machine; with one thread"
    )
    arguments = parser.parse_args()
    if arguments.processor_time:
        CLOCK.append(time.process_time)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory(KEPT_FREED_BYTES)  # as the engine does
    random.seed(0)
    for name in arguments.only.split(","):
        PARTS[name]()


if __name__ == "__main__":
    main()
