"""The cache follows the memory that is free; what has no room is refused, waits, or ends with a reason."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from small import small_model

from pumice import InputError
from pumice.engine import engine as engine_module
from pumice.engine import sizes
from pumice.engine.engine import Engine
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Delta, Prompt
from pumice.engine.sampling import SamplingParams
from pumice.engine.sizes import cache_size
from pumice.errors import WorkError
from pumice.model.cache import KVCache

MODEL = small_model(context=400)
EACH = KVCache.bytes_per_token(MODEL.config.decoder, torch.float32)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The free memory, in tokens of the cache; the last one counts."""
    amounts = [1e9]
    monkeypatch.setattr(sizes, "free_on", lambda _: amounts[-1] * EACH)
    monkeypatch.setattr(sizes, "_own_memory", lambda default: default)
    return amounts


def test_a_server_takes_at_most_its_share_of_what_is_free(free: list[float]) -> None:
    assert cache_size(MODEL, 16, None, 0.5) == 16 * 400
    free.append(5000)
    assert cache_size(MODEL, 16, None, 0.5) == 2500
    assert cache_size(MODEL, 16, None, 0.25) == 1250


def test_one_user_gets_a_gigabyte_or_a_context(free: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_size(MODEL, 4, None, None) == 2 * 4 * 400
    monkeypatch.setattr(sizes, "CACHE_BYTES", 600 * EACH)
    assert cache_size(MODEL, 4, None, None) == 600
    monkeypatch.setattr(sizes, "CACHE_BYTES", 100 * EACH)
    assert cache_size(MODEL, 4, None, None) == 400


def test_it_is_said_and_a_warning_where_the_context_is_cut(
    free: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pumice")
    cache_size(MODEL, 1, None, 0.5)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, f"the KV cache holds 400 tokens in {400 * EACH / 1e9:.2f} GB")
    ]
    free.append(300)
    cache_size(MODEL, 1, None, 0.5)
    assert caplog.records[-1].levelno == logging.WARNING
    assert "holds 150 tokens" in caplog.records[-1].getMessage()
    assert "context of 400" in caplog.records[-1].getMessage()


def test_weights_that_are_mapped_are_not_free(free: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(parameter.nbytes for parameter in MODEL.parameters())
    weights += sum(buffer.nbytes for buffer in MODEL.buffers())
    monkeypatch.setattr(sizes, "_own_memory", lambda default: default - 1000)
    assert sizes.free_memory(MODEL) == 1e9 * EACH - 1000
    monkeypatch.setattr(sizes, "_own_memory", lambda default: default + 1000)
    assert sizes.free_memory(MODEL) == 1e9 * EACH
    assert sizes._own_memory(weights) == weights + 1000


def test_a_block_gets_no_memory_that_mapped_weights_need(
    free: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pages count as free. A cache that took them would have every token read weights from the disk."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(sizes, "available_memory", lambda: sizes.RESERVE + 5e9 + 1)
    assert sizes.has_memory(cpu, 5e9)
    assert not sizes.has_memory(cpu, 5e9 + 1)
    # An engine passes on what is mapped of its own model.
    monkeypatch.setattr(sizes, "_own_memory", lambda default: 0.0)
    engine = Engine(MODEL, cache_tokens=100)
    assert engine._prefix_cache.has_memory()
    weights = sum(tensor.nbytes for tensor in (*MODEL.parameters(), *MODEL.buffers()))
    monkeypatch.setattr(sizes, "available_memory", lambda: float(sizes.RESERVE + weights))
    assert not engine._prefix_cache.has_memory()


def test_more_than_is_free_is_refused_at_once(free: list[float]) -> None:
    free.append(1000)
    with pytest.raises(InputError, match=r"KV cache of 1001 tokens takes .* GB .* give at most 1000 tokens"):
        Engine(MODEL, cache_tokens=1001)
    assert Engine(MODEL, cache_tokens=1000).stats().cache_capacity == 1000


def ask(engine: Engine, length: int, answer: int) -> tuple[Prompt, list[Delta]]:
    prompt = Prompt(torch.arange(1, 1 + length) % 100, params=SamplingParams(max_new_tokens=answer))
    deltas: list[Delta] = []
    engine.submit(prompt, deltas.append)
    return prompt, deltas


def test_when_memory_goes_away_requests_wait_for_others_or_end_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = [True]
    monkeypatch.setattr(engine_module, "has_memory", lambda device, mapped: there[-1])
    engine = Engine(MODEL, cache_tokens=1000, prefix_cache=False)
    first, first_deltas = ask(engine, 60, 4)
    engine.step()
    there.append(False)  # another process takes it
    second, second_deltas = ask(engine, 50, 4)
    engine.step()
    assert (len(first_deltas), second_deltas, engine.stats().waiting) == (2, [], 1)
    while engine.step():
        pass
    for prompt, deltas in ((first, first_deltas), (second, second_deltas)):  # in blocks that were used before
        assert [token for delta in deltas for token in delta.tokens] == naive_generate(MODEL, prompt)
        assert deltas[-1].finish == "length"
    _, deltas = ask(engine, 300, 4)
    while engine.step():
        pass
    assert (deltas[-1].finish, type(deltas[-1].error)) == ("error", WorkError)
    assert "no memory is left for the KV cache; close other programs" in str(deltas[-1].error)
    there.append(True)
    prompt, deltas = ask(engine, 300, 4)
    while engine.step():
        pass
    assert [token for delta in deltas for token in delta.tokens] == naive_generate(MODEL, prompt)


def test_an_answer_goes_on_where_its_blocks_end_and_memory_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the reason, and what it said until then was right."""
    there = [True]
    monkeypatch.setattr(engine_module, "has_memory", lambda device, mapped: there[-1])
    engine = Engine(MODEL, cache_tokens=1000)
    prompt, deltas = ask(engine, 10, 350)
    engine.step()
    there.append(False)
    while engine.step():
        pass
    tokens = [token for delta in deltas for token in delta.tokens]
    assert 100 < len(tokens) < 350
    assert tokens == naive_generate(MODEL, prompt)[: len(tokens)]
    assert isinstance(deltas[-1].error, WorkError)


@pytest.mark.parametrize("comes_back", [False, True])
def test_without_memory_for_the_first_that_waits_the_next_is_answered(
    comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory is there again at once: the reason is what was found when a block was missing."""
    memory = itertools.count()
    monkeypatch.setattr(engine_module, "has_memory", lambda device, mapped: comes_back and next(memory) > 1)
    engine = Engine(MODEL, cache_tokens=1000)
    engine._prefix_cache._used = 2  # blocks that have memory
    _, long = ask(engine, 300, 4)
    prompt, short = ask(engine, 100, 4)
    while engine.step():
        pass
    assert (long[-1].finish, type(long[-1].error)) == ("error", WorkError)
    assert [token for delta in short for token in delta.tokens] == naive_generate(MODEL, prompt)
