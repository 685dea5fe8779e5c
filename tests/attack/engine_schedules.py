"""Random schedules of the engine: pictures, schemas, cancels at any moment, threads, a cache that is full.

Every answer is compared with `naive_generate`, which has no cache at all.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from small import VOCABULARY, WIDTH, small_model

from pumice.config import IMAGE_TOKEN
from pumice.engine import engine as engine_module
from pumice.engine.constraint import JsonSchema
from pumice.engine.engine import Engine
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Delta, Prompt, PromptImage, Request
from pumice.engine.sampling import SamplingParams
from pumice.errors import InputError
from pumice.model.llava import Llava
from pumice.tokens import Tokenizer

PROMPTS = 60
STEPS = 30  # in which requests arrive; then all of them end
SCHEMAS = (
    {"enum": ["a", "bc", "bcd"]},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
)


def tokenizer() -> Tokenizer:
    """A token for each printable character, and one that ends answers."""
    backend = Backend(models.BPE({chr(33 + number): number for number in range(94)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend)


def make_prompt(draw: random.Random, constraints: list[JsonSchema]) -> Prompt:
    """A prompt of up to 30 tokens, often with the beginning of another one, and an answer of up to 20."""
    ids, images = [draw.choice((3, 4)) for _ in range(draw.randrange(12))], list[PromptImage]()
    for _ in range(draw.choice((0, 0, 1, 2))):
        seed, count = draw.randrange(4), draw.randint(1, 5)
        tokens = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
        images.append(PromptImage(f"{seed}-{count}", count, functools.partial(torch.clone, tokens)))
        ids += [IMAGE_TOKEN] * count
    ids += [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 8))]
    seeded = draw.random() < 0.4
    params = SamplingParams(
        max_new_tokens=draw.randint(1, 20),
        temperature=1.0 if seeded else 0.0,
        top_p=draw.choice((1.0, 0.7)),
        repetition_penalty=draw.choice((1.0, 1.3)),
        seed=draw.randrange(100),
    )
    constraint = draw.choice((None, None, *constraints))
    return Prompt(torch.tensor(ids), params=params, images=tuple(images), constraint=constraint)


@dataclass
class Asked:
    """A request and all that it delivered. leave: after so many tokens it cancels itself."""

    number: int
    leave: int | None
    request: Request | None = None
    deltas: list[Delta] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, engine: Engine, delta: Delta) -> None:
        self.deltas.append(delta)
        if self.leave is not None and len(self.tokens) >= self.leave and self.request is not None:
            engine.cancel(self.request)
        if delta.finish is not None:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    def problem(self, expected: list[int]) -> str:
        """Return what is wrong with the answer, or ""."""
        ends = [delta.finish for delta in self.deltas if delta.finish is not None]
        if len(ends) != 1 or self.deltas[-1].finish is None:
            return f"prompt {self.number} ended {len(ends)} times"
        if ends[0] == "cancelled":
            expected = expected[: len(self.tokens)]
        elif ends[0] == "error":
            return f"prompt {self.number} failed: {self.deltas[-1].error!r}"
        return "" if self.tokens == expected else f"prompt {self.number}: {self.tokens}, expected {expected}"


@dataclass(frozen=True)
class World:
    """A model, prompts and their answers."""

    model: Llava
    prompts: list[Prompt]
    answers: list[list[int]]


def make_world(window: int | None, constraints: list[JsonSchema]) -> World:
    model = small_model(window, stops=(94,), depth=1)  # small, for the more schedules
    model.tower = torch.nn.Identity()  # pictures come as tokens
    draw = random.Random(f"world {window}")
    prompts = [make_prompt(draw, constraints) for _ in range(PROMPTS)]
    return World(model, prompts, [naive_generate(model, prompt) for prompt in prompts])


def attack(_: Path) -> Iterator[Callable[[random.Random], str]]:
    constraints = [JsonSchema(tokenizer(), schema, VOCABULARY, (94,)) for schema in SCHEMAS]
    worlds = [make_world(window, constraints) for window in (None, 7)]
    while True:
        yield functools.partial(schedule, worlds)


def schedule(worlds: list[World], draw: random.Random) -> str:
    """Run one schedule. Return what is wrong, or ""."""
    world = draw.choice(worlds)
    block = draw.choice((1, 2, 5, 64))
    sizes = {"slots": draw.randint(1, 5), "chunk": draw.choice((1, 3, 16, 512))}
    capacity = draw.choice((20, 40, 64, 100, 300))  # the smaller ones are full all the time
    with mock.patch.object(engine_module, "BLOCK", block):
        engine = Engine(world.model, cache_tokens=capacity, prefix_cache=draw.random() < 0.8, **sizes)
    asked: list[Asked] = []
    if draw.random() < 0.1:
        problem = _threads(world, engine, asked, draw)
    else:
        problem = _steps(world, engine, asked, draw)
    return problem or next((p for one in asked if (p := one.problem(world.answers[one.number]))), "")


def _ask(world: World, engine: Engine, draw: random.Random) -> Asked | None:
    number = draw.randrange(PROMPTS)
    one = Asked(number, draw.randrange(20) if draw.random() < 0.2 else None)
    prompt = replace(world.prompts[number])
    try:
        one.request = engine.submit(prompt, functools.partial(one.deliver, engine))
    except InputError:  # it cannot fit in this cache, ever
        needed = len(prompt.input_ids) + prompt.params.max_new_tokens - 1
        assert needed > engine.cache_tokens, "a prompt that fits was refused"
        return None
    return one


def _steps(world: World, engine: Engine, asked: list[Asked], draw: random.Random) -> str:
    cancel_at = draw.randrange(STEPS)  # one request is cancelled before exactly this step
    for step in range(100 * STEPS):
        if step < STEPS and draw.random() < 0.4:
            asked += [one] if (one := _ask(world, engine, draw)) is not None else []
        if asked and (step == cancel_at or draw.random() < 0.03):
            chosen = draw.choice(asked)
            if chosen.request is not None:
                engine.cancel(chosen.request)
        if not engine.step() and step >= STEPS:
            return (
                ""
                if all(one.ended.is_set() for one in asked)
                else "the engine rests before all answers ended"
            )
    return "the schedule never ends"


def _threads(world: World, engine: Engine, asked: list[Asked], draw: random.Random) -> str:
    """Ask from several threads while the engine steps in its own; sometimes close it in the midst."""
    closes, engine_seeds = draw.random() < 0.3, [draw.random() for _ in range(3)]
    engine.start()

    def client(seed: float) -> None:
        own = random.Random(seed)
        for _ in range(8):
            try:
                one = _ask(world, engine, own)
            except RuntimeError:  # it is closed
                return
            if one is not None:
                asked.append(one)
                if own.random() < 0.3 and one.request is not None:
                    engine.cancel(one.request)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in engine_seeds]
    for thread in clients:
        thread.start()
    if closes:
        engine.close()
    for thread in clients:
        thread.join()
    stalled = [one.number for one in asked if not one.ended.wait(60)]
    engine.close()
    return f"prompts {stalled} never ended" if stalled else ""
