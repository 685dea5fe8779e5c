"""The engine gives the same tokens as `naive_generate`, whatever else it computes at the time.

In fp32 a pass over other tokens at once rounds otherwise, so two logits that are equal to about 1e-5 could
change places; the models here have weights so large that their logits are far apart.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import EXPECTED, KIT, MODELS, PROMPTS, Kit, Received, check_owners
from small import small_model

from pumice import InputError
from pumice.engine import engine as engine_module
from pumice.engine import scheduler as scheduling
from pumice.engine.engine import Engine
from pumice.engine.requests import Delta
from pumice.model.llava import Llava
from pumice.model.quantized import quantize

ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
)


@settings(max_examples=60)
@given(
    st.sampled_from(list(MODELS)),
    st.integers(1, 5),
    st.sampled_from([40, 64, 200]),
    st.sampled_from([1, 4, 64]),
    st.sampled_from([1, 3, 8, 512]),
    st.booleans(),
    st.lists(ACTIONS, max_size=25),
)
def test_answers_equal_the_naive_ones_whatever_happens(
    window: int | None,
    slots: int,
    cache_tokens: int,
    block: int,
    chunk: int,
    prefix: bool,
    actions: list[tuple[str, int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "BLOCK", block)
        engine = Engine(
            MODELS[window], slots=slots, cache_tokens=cache_tokens, chunk=chunk, prefix_cache=prefix
        )
    asked: list[tuple[int, Received]] = []
    cancelled = set()
    for action, number in actions:
        if action == "submit":
            asked.append((number, KIT.submit(engine, PROMPTS[number])))
        elif action == "step":
            for _ in range(number):
                engine.step()
        elif number < len(asked) and (request := asked[number][1].request) is not None:
            engine.cancel(request)
            cancelled.add(number)
    while engine.step():
        pass
    for index, (number, received) in enumerate(asked):
        expected = EXPECTED[window][number]
        if index in cancelled and received.last.finish == "cancelled":
            assert received.tokens == expected[: len(received.tokens)]
        else:
            assert (received.tokens, received.last.finish) == (expected, "length")
        assert [delta.finish for delta in received.deltas[:-1]] == [None] * (len(received.deltas) - 1)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.cached_tokens <= -(-cache_tokens // block) * block
    assert stats.cache_capacity == cache_tokens
    assert prefix or (stats.cached_tokens, stats.prefix_hits) == (0, 0)


def test_requests_join_and_leave_between_steps(kit: Kit, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(slots=2)
    first, second = (kit.submit(engine, PROMPTS[n]) for n in (3, 1))
    engine.step()
    engine.step()
    assert (len(first.tokens), len(second.tokens)) == (2, 2)
    third = kit.submit(engine, PROMPTS[8])
    engine.step()
    assert (second.last.finish, third.deltas) == ("length", [])
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)
    engine.step()
    assert (len(first.tokens), len(third.tokens)) == (4, 1)


def test_a_long_prompt_does_not_stall_the_others(kit: Kit, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(chunk=8)
    short = kit.submit(engine, kit.prompt(5, max_new_tokens=40))
    engine.step()
    long = kit.submit(engine, kit.prompt(*range(40)))
    for step in range(1, 6):
        assert long.deltas == []
        engine.step()
        assert len(short.tokens) == 1 + step
    assert len(long.tokens) == 1


@pytest.mark.parametrize("window", list(MODELS))
def test_every_request_ends_with_the_naive_answer_in_any_cache(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "SLOT_GROWTH", 3)
    blocks = random.Random(0)
    monkeypatch.setattr(scheduling, "MIN_SHARED_PREFIX", 2)
    for seed in range(12):
        draw = random.Random(seed)
        capacity, chunk = draw.choice([*range(1, 50), 96, 150]), draw.choice((1, 3, 512))
        monkeypatch.setattr(engine_module, "BLOCK", blocks.choice((1, 2, 3, 5, 64)))
        engine = Engine(MODELS[window], slots=draw.randint(1, 4), cache_tokens=capacity, chunk=chunk)
        asked: list[tuple[int, Received]] = []
        cancelled: set[int] = set()
        work = 0
        for steps in itertools.count():
            assert steps <= 100 + 20 * work, f"schedule {seed} never ends"
            if steps < 40 and draw.random() < 0.3:
                number = draw.randrange(len(PROMPTS))
                length, max_answer = len(PROMPTS[number].input_ids), PROMPTS[number].params.max_new_tokens
                if length + max_answer - 1 > capacity:
                    with pytest.raises(InputError, match=f"{length} tokens .* {capacity}"):
                        KIT.submit(engine, PROMPTS[number])
                else:
                    asked.append((number, KIT.submit(engine, PROMPTS[number])))
                    work += length + max_answer
            if asked and draw.random() < 0.05:
                cancelled.add(index := draw.randrange(len(asked)))
                if (request := asked[index][1].request) is not None:
                    engine.cancel(request)
            worked = engine.step()
            check_owners(engine)
            if not worked:
                assert all(received.deltas and received.last.finish for _, received in asked), (
                    f"schedule {seed} stalls"
                )
                if steps >= 40:
                    break
        for index, (number, received) in enumerate(asked):
            expected = EXPECTED[window][number]
            if index in cancelled and received.last.finish == "cancelled":
                expected = expected[: len(received.tokens)]
            else:
                assert received.last.finish == "length"
            assert received.tokens == expected, f"schedule {seed}"
            assert sum(delta.finish is not None for delta in received.deltas) == 1


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(kit: Kit) -> None:
    free = EXPECTED[None][0]
    (received,) = kit.run(Engine(small_model(stops=(free[4],))), PROMPTS[0])
    assert (received.tokens, received.last.tokens, received.last.finish) == (
        free[: free.index(free[4])],
        (),
        "stop",
    )


def test_log_probabilities(kit: Kit, model: Llava, make_engine: Callable[..., Engine]) -> None:
    asked = kit.prompt(1, 2, 3, logprobs=3, max_new_tokens=2)
    (received,) = kit.run(make_engine(), asked)
    logits = model.decoder.logits(model(torch.tensor([[1, 2, 3]])))[0, -1]
    expected = logits.log_softmax(-1).topk(3)
    [first] = received.deltas[0].logprobs or ()
    assert [token for token, _ in first.top] == expected.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert (first.token, first.logprob) == first.top[0]
    (bare,) = kit.run(make_engine(), kit.prompt(1, 2, logprobs=0, max_new_tokens=1))
    assert bare.last.logprobs is not None
    assert bare.last.logprobs[0].top == ()
    assert math.exp(bare.last.logprobs[0].logprob) <= 1


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_long_prompt_is_read_in_parts_with_few_bits_too(kind: str, kit: Kit) -> None:
    """A step that no answer is due after has nothing for the last block's output to do."""
    model = small_model(mlp_width=64)
    quantize(model.decoder, kind)
    answers = [kit.run(Engine(model, chunk=chunk), PROMPTS[1])[0] for chunk in (3, 512)]
    assert [one.last.error for one in answers] == [None, None]
    assert answers[0].tokens[0] == answers[1].tokens[0]  # later ones may differ: bfloat16 rounds otherwise


def test_threads_submit_and_cancel_while_it_steps(kit: Kit, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(slots=3)
    engine.start()
    engine.start()
    failures: list[str] = []

    def ask(number: int) -> None:
        for turn in range(5):
            index = (number + turn) % len(PROMPTS)
            finished_event, tokens = threading.Event(), list[int]()

            def deliver(
                delta: Delta, finished_event: threading.Event = finished_event, tokens: list[int] = tokens
            ) -> None:
                tokens.extend(delta.tokens)
                if delta.finish is not None:
                    finished_event.set()

            request = engine.submit(PROMPTS[index], deliver)
            if turn == 3:
                engine.cancel(request)
                engine.cancel(request)
            if not finished_event.wait(60):
                failures.append(f"{number}.{turn} did not end")
            expected = EXPECTED[None][index]
            if tokens != (expected[: len(tokens)] if turn == 3 else expected):
                failures.append(f"{number}.{turn} said {tokens}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    engine.close()


def test_close_cancels_what_runs_and_what_waits(kit: Kit, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(slots=1)
    received = [kit.submit(engine, PROMPTS[n]) for n in (0, 1)]
    engine.step()
    late = kit.submit(engine, PROMPTS[2])
    engine.close()
    engine.close()
    assert [one.last.finish for one in (*received, late)] == ["cancelled"] * 3
    assert received[0].tokens == EXPECTED[None][0][:1]
    with pytest.raises(RuntimeError, match="closed"):
        kit.submit(engine, PROMPTS[0])
    assert not engine.step()
