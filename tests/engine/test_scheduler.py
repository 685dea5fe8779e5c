"""The scheduler over many seeded schedules, with a KV cache that records which token each cell holds.

No model runs. A step writes into a token's cell the hash of the sequence up to it. If a cell holds anything
else, a real engine would have given a wrong answer.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pumice.engine import scheduler as scheduling
from pumice.engine.cache import PrefixCache
from pumice.engine.requests import Prompt, Request
from pumice.engine.sampling import SamplingParams
from pumice.engine.scheduler import Scheduler
from pumice.errors import WorkError


@dataclass
class Shape:
    """What a schedule is drawn from."""

    context: int
    growth: int  # tokens that a slot grows by
    requests: int
    prompt: tuple[int, int]  # tokens, from and to
    answer: tuple[int, int]


SMALL = Shape(context=48, growth=5, requests=12, prompt=(1, 30), answer=(1, 40))
# A 7B model's default cache holds one context.
LARGE = Shape(context=4096, growth=128, requests=6, prompt=(20, 2500), answer=(1, 1500))


@dataclass
class Simulation:
    """An engine without a model: the same steps, with numbers for tokens."""

    shape: Shape
    seed: int
    cache_tokens: int
    ended: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        small = self.shape.context < 100
        self.block = self.random.choice((1, 2, 3, 4, 7)) if small else 64
        blocks = -(-self.cache_tokens // self.block)
        self.prefix_cache = PrefixCache(
            blocks, self.block, self.copy_cells, keep_finished=self.random.random() < 0.9
        )
        self.cells = np.zeros((blocks, self.block), np.int64)
        chunk = self.random.choice((1, 4, 512)) if small else 512
        self.scheduler = Scheduler(self.random.choice((1, 2, 4)), chunk, self.prefix_cache)
        self.prompts: list[list[int]] = []

    def copy_cells(self, source: int, target: int, tokens: int) -> None:
        self.cells[target, :tokens] = self.cells[source, :tokens]

    def request(self) -> Request:
        """Draw a request. It often shares a prefix with an earlier one, and always fits in the cache."""
        draw = self.random
        length = min(draw.randint(*self.shape.prompt), self.cache_tokens)
        ids = list(draw.choice(self.prompts)[: draw.randint(0, length)]) if self.prompts else []
        ids += [draw.randint(0, 3) for _ in range(length - len(ids))]
        max_answer = min(draw.randint(*self.shape.answer), self.cache_tokens - length + 1)
        prompt = Prompt(torch.tensor(ids), params=SamplingParams(max_new_tokens=max(1, max_answer)))
        max_cells = min(self.shape.context, length + prompt.params.max_new_tokens) - 1
        self.prompts.append(ids)
        return Request(prompt, lambda delta: None, torch.Generator(), max(max_cells, length))

    def step(self) -> bool:
        plan = self.scheduler.plan()
        for request, count in plan:
            slot = request.slot
            assert slot is not None
            done, end = slot.length, slot.length + count
            written = prefix_hashes(request.token_hashes[:end])
            assert (self.cells[slot.table].ravel()[:done] == written[:done]).all()
            for position in range(done, end):
                self.cells[slot.table[position // self.block], position % self.block] = written[position]
        for request, count in plan:
            if request.slot is not None:
                self.prefix_cache.record(request.slot, request.token_hashes[: request.slot.length + count])
        for request, _ in plan:
            if request.remaining == 0:
                request.append(self.random.randint(0, 3))
                if request.length > request.max_cells or self.random.random() < 0.002:
                    self.end(request)
        return bool(plan)

    def end(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.ended.append(request)

    def check(self) -> None:
        """Every block counts its owners, and is busy, idle or free."""
        cache = self.prefix_cache
        slots = [request.slot for request in self.scheduler.running if request.slot is not None]
        assert len(slots) == len(self.scheduler.running)
        owners = Counter(number for slot in slots for number in slot.table)
        assert owners == {number: block.owners for number, block in cache.busy.items()}
        assert sorted([*cache.busy, *cache.idle, *cache._free]) == list(range(cache.blocks))
        assert all(slot.length <= len(slot.blocks) * self.block for slot in slots)
        assert all(request.slot is None for request in self.scheduler.waiting)
        assert cache.cached_tokens == sum(block.length for block in cache.idle.values())

    def check_counts(self, requests: list[Request]) -> None:
        """Each prompt counts once, however often its request was preempted."""
        admitted = [request for request in requests if request.admitted]
        assert self.scheduler.prompt_tokens == sum(len(request.prompt.input_ids) for request in admitted)
        assert self.scheduler.prefix_hits == sum(request.cached_tokens for request in admitted)

    def run(self) -> bool:
        """Return whether every request ends: False if a step does nothing while one waits."""
        requests = [self.request() for _ in range(self.shape.requests)]
        work = sum(request.max_cells for request in requests)
        late = list(requests)
        for steps in itertools.count():
            assert steps <= 20 * work + 100, "the requests never end"
            while late and self.random.random() < (0.1 if self.scheduler.running else 0.6):
                self.scheduler.waiting.append(late.pop(0))
            active = (*self.scheduler.running, *self.scheduler.waiting)
            if active and self.random.random() < 0.003:
                self.end(self.random.choice(active))
            worked = self.step()
            self.check()
            if not worked:
                if self.scheduler.running or self.scheduler.waiting:
                    return False
                if not late:
                    assert len(self.ended) == len(requests)
                    self.check_counts(requests)
                    return True
        raise AssertionError


def prefix_hashes(token_hashes: np.ndarray) -> np.ndarray:
    """Return a hash of each prefix of a sequence."""
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(token_hashes), 6364136223846793005, np.int64))
        return np.cumsum((token_hashes + 7) * powers)


def simulate(shape: Shape, seeds: range, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the seeds whose schedule stalls."""
    monkeypatch.setattr(scheduling, "SLOT_GROWTH", shape.growth)
    monkeypatch.setattr(scheduling, "MIN_SHARED_PREFIX", 4 if shape.context < 100 else 16)
    sizes = [shape.context, shape.context, shape.context * 2]
    if shape.context < 100:
        sizes += range(1, shape.context)  # from one cell up
    return [s for s in seeds if not Simulation(shape, s, random.Random(s).choice(sizes)).run()]


@pytest.mark.parametrize(("shape", "seeds"), [(SMALL, range(300)), (LARGE, range(4))], ids=["small", "7b"])
def test_every_request_ends_and_every_block_counts_its_owners(
    shape: Shape, seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert simulate(shape, seeds, monkeypatch) == []


def request_of(*ids: int) -> Request:
    """A request for one token. Its slot takes as many cells as its prompt has tokens."""
    prompt = Prompt(torch.tensor(ids), params=SamplingParams(max_new_tokens=1))
    return Request(prompt, lambda delta: None, torch.Generator(), len(ids))


def beside_a_running_request() -> Scheduler:
    """4 blocks of 3: one of an idle sequence (1, 2, 3), one of another idle one, two of a running request."""
    scheduler = Scheduler(4, 512, PrefixCache(4, 3, lambda source, target, tokens: None))
    requests = [request_of(1, 2, 3), request_of(9, 9, 9), request_of(8, 8, 8, 8, 8, 8)]
    scheduler.waiting.extend(requests)
    for request, count in scheduler.plan():
        assert request.slot is not None
        scheduler.prefix_cache.record(request.slot, request.token_hashes[:count])
    for request in requests[:2]:
        scheduler.remove(request)
    return scheduler


def test_the_next_turn_starts_beside_a_running_request_and_evicts_the_idle_one() -> None:
    scheduler = beside_a_running_request()
    next_turn = request_of(1, 2, 3, 4, 5)
    scheduler.waiting.append(next_turn)
    scheduler.plan()
    assert next_turn in scheduler.running and next_turn.cached_tokens == 3
    assert not scheduler.prefix_cache.idle


def test_a_request_without_room_waits_and_costs_nobody_s_cache() -> None:
    scheduler = beside_a_running_request()
    longer = request_of(1, 2, 3, 7, 7, 7, 7)
    scheduler.waiting.append(longer)
    scheduler.plan()
    assert longer in scheduler.waiting
    assert sorted(block.length for block in scheduler.prefix_cache.idle.values()) == [3, 3]
    scheduler.remove(scheduler.running[0])
    scheduler.plan()
    assert longer in scheduler.running and longer.cached_tokens == 3


@pytest.mark.parametrize(("cache_tokens", "most"), [(18_215, 1.05), (4096, 1.2)])
def test_little_is_computed_twice(cache_tokens: int, most: float) -> None:
    """Prompts of 600 tokens, answers of 512, at the default slots: with the cache of a 7B in 4 bits on 24 GB,
    and with one that holds four of them. Measured: 1.003 and 1.12."""
    draw = random.Random(0)
    scheduler = Scheduler(
        16, 512, PrefixCache(-(-cache_tokens // 64), 64, lambda source, target, tokens: None)
    )
    params = SamplingParams(max_new_tokens=512)
    prompts = [
        Prompt(torch.tensor([draw.randrange(30_000) for _ in range(600)]), params=params) for _ in range(32)
    ]
    requests = [Request(prompt, lambda delta: None, torch.Generator(), 600 + 511) for prompt in prompts]
    scheduler.waiting.extend(requests)
    computed = 0
    while plan := scheduler.plan():
        for request, count in plan:
            computed += count
            assert request.slot is not None
            scheduler.prefix_cache.record(request.slot, request.token_hashes[: request.slot.length + count])
            if request.remaining == 0:
                request.append(draw.randrange(30_000))
                if request.length > request.max_cells:
                    scheduler.remove(request)
    needed = sum(request.max_cells for request in requests)
    print(f"cache of {cache_tokens}: {computed / needed:.3f}")
    assert 1 <= computed / needed <= most


def test_without_memory_a_request_ends_with_the_reason() -> None:
    scheduler = beside_a_running_request()
    scheduler.remove(scheduler.running[0])
    cache = PrefixCache(4, 3, lambda source, target, tokens: None, has_memory=lambda: False)
    scheduler.prefix_cache = cache
    scheduler.waiting.append(request_of(1))
    with pytest.raises(WorkError, match="no memory is left for the KV cache; close other programs"):
        scheduler.plan()
