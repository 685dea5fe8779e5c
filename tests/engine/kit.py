"""Prompts that share prefixes of text and images, their right answers, and what a request delivers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from small import WIDTH, small_model

from pumice.config import IMAGE_TOKEN
from pumice.engine.engine import Engine
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Delta, Prompt, PromptImage, Request
from pumice.engine.sampling import SamplingParams


@dataclass
class Received:
    """All deltas that one request delivered."""

    deltas: list[Delta] = field(default_factory=list)
    request: Request | None = None

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def last(self) -> Delta:
        return self.deltas[-1]


@dataclass
class Kit:
    """Builds prompts, and keeps which images were encoded and what the engine delivers."""

    encoded: list[str] = field(default_factory=list)  # keys of the images that were encoded, in order

    def image(self, seed: int, count: int) -> PromptImage:
        tokens = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))

        def encode() -> torch.Tensor:
            self.encoded.append(f"image {seed}")
            return tokens

        return PromptImage(f"image {seed}", count, encode)

    def prompt(self, *parts: int | PromptImage, **sampling: object) -> Prompt:
        """Build a prompt from ids and images."""
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else [IMAGE_TOKEN] * part.count
        images = tuple(part for part in parts if isinstance(part, PromptImage))
        params = SamplingParams(**{"max_new_tokens": 10, **sampling})
        return Prompt(torch.tensor(ids), None, params, images)

    @staticmethod
    def submit(engine: Engine, prompt: Prompt) -> Received:
        received = Received()
        received.request = engine.submit(prompt, received.deltas.append)
        return received

    def run(self, engine: Engine, *prompts: Prompt) -> list[Received]:
        received = [self.submit(engine, prompt) for prompt in prompts]
        while engine.step():
            pass
        return received


KIT = Kit()
MODELS = {window: small_model(window) for window in (None, 7)}
IMAGES = [KIT.image(seed, count) for seed, count in ((1, 4), (2, 9), (3, 4))]
# Prompts that share prefixes of text and images, differ early, or contain one another.
PROMPTS = [
    KIT.prompt(1, 2, 3),
    KIT.prompt(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, max_new_tokens=3),
    KIT.prompt(1, IMAGES[0], 4, 5),
    KIT.prompt(1, IMAGES[0], 4, 6, max_new_tokens=14),
    KIT.prompt(1, IMAGES[1], 4, 5, max_new_tokens=6),
    KIT.prompt(1, IMAGES[0], 7, IMAGES[1], 8, IMAGES[2], 9),
    KIT.prompt(1, IMAGES[0], 7, IMAGES[2], 8, max_new_tokens=5),
    KIT.prompt(IMAGES[1], *range(30, 50), max_new_tokens=1),
    KIT.prompt(9),
    KIT.prompt(1, IMAGES[2], 4, 5, temperature=1.5, top_p=0.9, seed=5),
    KIT.prompt(1, IMAGES[2], 4, 5, repetition_penalty=3.0),
]
EXPECTED = {w: [naive_generate(m, p) for p in PROMPTS] for w, m in MODELS.items()}


def check_owners(engine: Engine) -> None:
    """Every block counts the running requests whose tables name it, and has one of three states."""
    prefix = engine._prefix_cache
    slots = [request.slot for request in engine._scheduler.running if request.slot is not None]
    owners = Counter(block.number for slot in slots for block in slot.blocks)
    assert owners == {number: block.owners for number, block in prefix.busy.items()}
    states = [*prefix.busy, *prefix.idle, *prefix._free]
    assert sorted(states) == list(range(prefix.blocks))
    assert prefix.cached_tokens == sum(block.length for block in prefix.idle.values())
    for slot in slots:
        assert slot.table == [block.number for block in slot.blocks]
        assert slot.length <= len(slot.blocks) * prefix.block


def is_interrupted(engine: Engine, trace: Callable[[FrameType, str, object], Any]) -> bool:
    """Run all steps under a trace function. Return whether Ctrl-C interrupted them."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        while engine.step():
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
