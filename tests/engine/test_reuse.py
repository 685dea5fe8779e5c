"""The engine does not compute again what it has computed, while there is room to keep it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kit import PROMPTS, Kit
from small import small_model

from pumice.engine import engine as engine_module
from pumice.engine.engine import Engine
from pumice.engine.generate import naive_generate
from pumice.model.llava import Llava


def test_a_second_question_about_a_picture_computes_only_the_question(
    kit: Kit, make_engine: Callable[..., Engine]
) -> None:
    engine, shown = make_engine(), kit.image(1, 9)
    (first,) = kit.run(engine, kit.prompt(1, shown, 3, 4))
    assert (kit.encoded, first.last.cached_tokens) == (["image 1"], 0)
    before = engine.stats()
    (second,) = kit.run(engine, kit.prompt(1, shown, 5, 6))
    assert (kit.encoded, second.last.cached_tokens) == (["image 1"], 10)
    assert engine.stats().prefix_hits - before.prefix_hits == 10
    (other,) = kit.run(engine, kit.prompt(1, kit.image(2, 9), 5, 6))
    assert (len(kit.encoded), other.last.cached_tokens) == (2, 1)


def test_questions_about_one_picture_that_come_together_look_once(
    kit: Kit, make_engine: Callable[..., Engine]
) -> None:
    shown = kit.image(1, 40)
    asked = [kit.prompt(shown, n, n + 1) for n in range(6)]
    received = kit.run(make_engine(chunk=16), *asked)
    assert kit.encoded == ["image 1"]
    assert [one.last.cached_tokens for one in received] == [0, 40, 40, 40, 40, 40]


def test_a_second_turn_computes_only_what_is_new(
    kit: Kit, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, shown = make_engine(), kit.image(1, 9)
    (first,) = kit.run(engine, kit.prompt(1, shown, 3, 4))
    monkeypatch.setattr(engine._prefix_cache, "_copy", None)  # it continues in the same block
    (second,) = kit.run(engine, kit.prompt(1, shown, 3, 4, *first.tokens, 7, 8))
    # the last token of an answer was never fed to the model
    assert second.last.cached_tokens == 12 + len(first.tokens) - 1
    assert engine.stats().cached_tokens == 12 + len(first.tokens) + 2 + len(second.tokens) - 1


def test_the_same_prompt_again_computes_its_last_token(kit: Kit, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    first, second = (kit.run(engine, PROMPTS[5])[0] for _ in range(2))
    assert first.tokens == second.tokens
    assert second.last.cached_tokens == len(PROMPTS[5].input_ids) - 1


def test_eviction_keeps_the_budget_and_the_newest(
    kit: Kit, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BLOCK", 10)
    engine = make_engine(cache_tokens=60)
    for seed in (1, 2, 3, 4):
        kit.run(engine, kit.prompt(kit.image(seed, 10), 5, max_new_tokens=8))
    assert engine.stats().evictions == 2
    assert kit.run(engine, kit.prompt(kit.image(4, 10), 6))[0].last.cached_tokens == 10
    assert kit.run(engine, kit.prompt(kit.image(1, 10), 6))[0].last.cached_tokens == 0


def test_answers_that_outgrow_the_cache_wait_and_go_on(kit: Kit, model: Llava) -> None:
    """Three answers that together need more than all of it: the newest are put back, and none is wrong."""
    large = small_model(context=400)
    asked = [kit.prompt(n, n + 1, max_new_tokens=150) for n in (1, 5, 9)]
    engine = Engine(large, cache_tokens=384)  # six blocks
    received = kit.run(engine, *asked)
    assert [one.tokens for one in received] == [naive_generate(large, one) for one in asked]
    assert sum(len(one.tokens) for one in received) == 450


def test_an_answer_grows_over_what_stands_on_either_side(kit: Kit) -> None:
    """A finished sequence in front of it, free places behind it: neither alone is enough."""
    large = small_model(context=400)
    engine = Engine(large, slots=1, cache_tokens=300)
    kit.run(engine, kit.prompt(*range(5, 100), max_new_tokens=1))
    asked = kit.prompt(*range(100, 27, -1), max_new_tokens=180)
    (received,) = kit.run(engine, asked)
    assert received.tokens == naive_generate(large, asked)
    assert engine.stats().prompt_tokens == 95 + 73
    assert engine.stats().steps == 1 + 180  # nothing was computed twice


def test_a_model_that_changed_is_not_mixed_with_what_it_said_before(kit: Kit) -> None:
    model = small_model()
    engine = Engine(model)
    kit.run(engine, PROMPTS[2])
    with torch.no_grad():
        model.decoder.blocks[0].mlp.down.weight.neg_()
    engine.forget()
    assert kit.run(engine, PROMPTS[2])[0].tokens == naive_generate(model, PROMPTS[2])
