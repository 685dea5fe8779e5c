"""Beam search gives the answer of a plain search, whatever else the engine does.

`tests/model/test_parity.py` compares it with transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import IMAGES, KIT, Kit, Received, check_owners, is_interrupted
from small import small_model

from pumice import InputError
from pumice.engine import beams
from pumice.engine import engine as engine_module
from pumice.engine.engine import Engine
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Prompt, PromptImage
from pumice.engine.sampling import SamplingParams

# Tokens that these prompts make likely end answers, after few tokens and after many.
MODEL = small_model(stops=(8, 55, 91))
PARTS: list[tuple[Any, ...]] = [
    (1, 2, 3),
    (1, 2, 3, 4, 5, 6, 7, 9, 10, 11),
    (1, IMAGES[0], 4, 5),
    (1, IMAGES[0], 4, 6),
    (1, IMAGES[0], 7, IMAGES[1], 9),
    (9,),
]


def letters(tokens: Sequence[int]) -> str:
    """The text of tokens: one letter each."""
    return "".join(chr(ord("a") + token % 26) for token in tokens)


SEARCHES = [
    dataclasses.replace(
        KIT.prompt(*parts, max_new_tokens=longest, num_beams=width, length_penalty=penalty, stop=stop),
        decode=letters,
    )
    for parts in PARTS
    for width, penalty, longest, stop in (
        (2, 1.0, 9, ()),
        (3, 0.5, 14, ()),
        (4, 2.0, 7, ()),
        (3, 0.0, 1, ()),
        (3, 1.0, 12, ("a", "eb", "q")),
    )
]


def plain_search(prompt: Prompt) -> tuple[list[int], str]:
    """Return the tokens and how they ended, from a pass over everything for each hypothesis."""
    params, width = prompt.params, prompt.params.num_beams

    def holds_stop(tokens: list[int]) -> bool:
        return any(stop in letters(tokens) for stop in params.stop)

    images = prompt.encode_images()
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int], str]] = []
    for length in range(1, params.max_new_tokens + 1):
        continued = []
        for total, tokens in live:
            ids = torch.tensor([[*prompt.input_ids.tolist(), *tokens]])
            logprobs = MODEL.decoder.logits(MODEL(ids, images)[:, -1])[0].log_softmax(-1).tolist()
            continued += [(total + logprob, tokens, token) for token, logprob in enumerate(logprobs)]
        continued.sort(key=lambda one: -one[0])
        for total, tokens, token in continued[:width]:
            score = total / length**params.length_penalty
            if token in MODEL.config.stop_token_ids:
                ended.append((score, tokens, "stop"))
            elif holds_stop([*tokens, token]):
                ended.append((score, [*tokens, token], "stop"))
            elif length == params.max_new_tokens:
                ended.append((score, [*tokens, token], "length"))
        ended = sorted(ended, key=lambda one: -one[0])[:width]
        going_on = (
            (total, [*tokens, token])
            for total, tokens, token in continued
            if token not in MODEL.config.stop_token_ids and not holds_stop([*tokens, token])
        )
        live = [*itertools.islice(going_on, width)]
        if len(ended) == width and live[0][0] / length**params.length_penalty <= ended[-1][0]:
            break
    return ended[0][1], ended[0][2]


@functools.cache
def expected(number: int) -> tuple[list[int], str]:
    with torch.no_grad():
        return plain_search(SEARCHES[number])


def check(number: int, received: Received) -> None:
    """A search delivers its answer as a whole."""
    (delta,) = received.deltas
    assert (list(delta.tokens), delta.finish) == expected(number)
    assert received.request is not None and received.request.tokens == received.tokens


def test_the_answers_differ_from_greedy_ones_and_end_in_both_ways() -> None:
    """So that the other tests show something."""
    answers = [expected(number) for number in range(len(SEARCHES))]
    assert {finish for _, finish in answers} == {"stop", "length"}
    assert len({len(tokens) for tokens, _ in answers}) > 4
    one = [dataclasses.replace(p, params=dataclasses.replace(p.params, num_beams=1)) for p in SEARCHES]
    greedy = [naive_generate(MODEL, prompt) for prompt in one]
    assert sum(tokens != other for (tokens, _), other in zip(answers, greedy, strict=True)) > 8
    stopped = [tokens for (tokens, _), one in zip(answers, SEARCHES, strict=True) if one.holds_stop(tokens)]
    assert len({len(tokens) for tokens in stopped}) > 1


ACTIONS = st.one_of(
    st.tuples(st.just("search"), st.integers(0, len(SEARCHES) - 1)),
    st.tuples(st.just("greedy"), st.integers(0, len(PARTS) - 1)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
)


@settings(max_examples=25)
@given(
    st.integers(1, 5),
    st.sampled_from([40, 64, 200]),
    st.sampled_from([1, 4, 64]),
    st.sampled_from([1, 3, 512]),
    st.booleans(),
    st.lists(ACTIONS, max_size=25),
)
def test_answers_equal_the_plain_ones_whatever_happens(
    slots: int, cache_tokens: int, block: int, chunk: int, prefix: bool, actions: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "BLOCK", block)
        engine = Engine(MODEL, slots=slots, cache_tokens=cache_tokens, chunk=chunk, prefix_cache=prefix)
    searches: list[tuple[int, Received]] = []
    others: list[tuple[Prompt, Received]] = []
    for action, number in actions:
        if action == "search":
            searches.append((number, KIT.submit(engine, SEARCHES[number])))
        elif action == "greedy":
            prompt = KIT.prompt(*PARTS[number])
            others.append((prompt, KIT.submit(engine, prompt)))
        elif action == "step":
            for _ in range(number):
                engine.step()
                check_owners(engine)
        elif number < len(searches):
            request = searches[number][1].request
            assert request is not None
            engine.cancel(request)
    while engine.step():
        check_owners(engine)
    for number, received in searches:
        assert len(received.deltas) == 1
        if received.last.finish != "cancelled":
            check(number, received)
    for prompt, received in others:
        assert received.tokens == naive_generate(MODEL, prompt)
    assert engine.stats().running == engine.stats().waiting == 0
    assert not engine._searches._running
    assert engine.stats().generated_tokens == sum(len(r.tokens) for _, r in [*searches, *others])


def test_an_interruption_at_any_line_loses_no_search(kit: Kit) -> None:
    """As Ctrl-C interrupts a step that chooses hypotheses."""
    lines, countdown = 0, 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines, countdown
        if frame.f_code.co_filename != beams.__file__ or event not in ("call", "line"):
            return trace if frame.f_code.co_filename == beams.__file__ else None
        lines += 1
        countdown -= 1
        if not countdown:
            raise KeyboardInterrupt
        return trace

    def run(number: int, interrupted_at: int) -> None:
        nonlocal countdown
        engine = Engine(MODEL, slots=4, cache_tokens=64)
        received, beside = kit.submit(engine, SEARCHES[number]), kit.submit(engine, KIT.prompt(*PARTS[1]))
        countdown = interrupted_at
        assert is_interrupted(engine, trace) == bool(interrupted_at)
        while engine.step():
            check_owners(engine)
        check(number, received)
        assert beside.tokens == naive_generate(MODEL, KIT.prompt(*PARTS[1]))

    run(1, 0)
    for line in range(1, lines + 1, 31):
        run(1, line)


def check_cancelling(engine: Engine, received: Received) -> None:
    """A search that has begun ends once, and nothing of it is left."""
    for _ in range(3):
        engine.step()
    assert received.request is not None and not received.deltas
    engine.cancel(received.request)
    engine.step()
    assert [delta.finish for delta in received.deltas] == ["cancelled"]
    assert not engine._requests()


def test_a_search_that_fails_or_is_cancelled_ends_once(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL)
    check_cancelling(engine, kit.submit(engine, SEARCHES[1]))

    received = kit.submit(engine, SEARCHES[1])
    engine.step()

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(beams.BeamSearch, "advance", fail)
        engine.step()
    assert [delta.finish for delta in received.deltas] == ["error"]
    assert not engine._requests() and not engine.step()
    check(1, kit.run(engine, SEARCHES[1])[0])


class Interrupts(dict[Any, Any]):
    """A dict that Ctrl-C interrupts before it grows."""

    def __setitem__(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_a_search_that_is_interrupted_as_it_begins_can_be_cancelled(kit: Kit) -> None:
    engine = Engine(MODEL)
    received = kit.submit(engine, SEARCHES[1])
    engine._searches._running = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._searches._running = {}
    check_cancelling(engine, received)


def test_an_image_that_fails_ends_its_own_search_only(kit: Kit) -> None:
    """Without a cache, hypotheses encode it again. The second time fails, the third does not."""
    calls = itertools.count(1)

    def encode() -> torch.Tensor:
        if next(calls) == 2:
            raise MemoryError("no memory")
        return IMAGES[0].encode()

    engine = Engine(MODEL, prefix_cache=False)
    image = PromptImage("image", IMAGES[0].count, encode)
    failing = kit.submit(engine, kit.prompt(1, image, 4, num_beams=3))
    beside = kit.submit(engine, KIT.prompt(*PARTS[1]))
    while engine.step():
        check_owners(engine)
    assert [(delta.finish, str(delta.error)) for delta in failing.deltas] == [("error", "no memory")]
    assert next(calls) > 3
    assert beside.tokens == naive_generate(MODEL, KIT.prompt(*PARTS[1]))


def test_hypotheses_share_what_is_computed(kit: Kit) -> None:
    engine = Engine(MODEL)
    kit.run(engine, SEARCHES[11])
    assert kit.encoded == []  # KIT's own pictures count there
    assert engine.stats().prompt_tokens == len(SEARCHES[11].input_ids)
    assert engine.stats().prefix_hits == 0
    assert kit.run(engine, SEARCHES[11])[0].last.cached_tokens == len(SEARCHES[11].input_ids) - 1


@pytest.mark.parametrize(
    "other", [{"temperature": 0.5}, {"repetition_penalty": 1.1}, {"logprobs": 0}, {"presence_penalty": 0.1}]
)
def test_what_goes_with_beams(other: dict[str, Any]) -> None:
    (name,) = other
    message = f"num_beams is 3, which does not go with {name}; give num_beams 1, or (no )?{name}"
    with pytest.raises(InputError, match=message):
        SamplingParams(num_beams=3, **other)
    # The model's own beams give way, those of the user do not.
    own = {"num_beams": 3, "length_penalty": 0.5, "temperature": 0.0}
    assert "num_beams" not in SamplingParams.options(own, other)
    assert SamplingParams.options(own, {"max_new_tokens": 2})["num_beams"] == 3
    with pytest.raises(InputError, match=message):
        SamplingParams.options(own, {"num_beams": 3, **other})
    # What the model's folder says beside no beams gives way, too.
    assert SamplingParams.of(SamplingParams.options(other, {"num_beams": 3})) == SamplingParams(num_beams=3)


DRAWN = {"temperature": 0.7, "top_p": 0.9}
SEARCHED = {"num_beams": 3, "length_penalty": 0.5}


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        ({}, {"top_p": 0.9, "min_p": 0.1}, "top_p and min_p do nothing where .*; give a temperature, or "),
        (SEARCHED, {"top_k": 5}, "top_k does nothing where no word is drawn; give a temperature"),
        (DRAWN, {"num_beams": 3, "min_p": 0.1}, "min_p does nothing where no word is drawn; leave min_p out"),
        ({}, {"length_penalty": 0.5}, "length_penalty is 0.5, which does nothing without beams; give num_"),
        # Beams would be refused beside what is given.
        ({}, {"length_penalty": 2.0, "temperature": 1.0}, "length_penalty is 2.0, .* beams; leave length_pe"),
        (SEARCHED, {"length_penalty": 2.0, "repetition_penalty": 1.1}, "length_.* beams; leave length_pen"),
        (DRAWN, {"length_penalty": 2.0}, "length_penalty is 2.0, .* beams; give num_beams 2 or more, or"),
        (SEARCHED, {"num_beams": 1, "length_penalty": 2.0}, "length_penalty is 2.0, which does nothing"),
        (SEARCHED, {"temperature": 1.0, "length_penalty": 2.0}, "length_penalty is 2.0, which does nothing"),
        ({}, {"num_beams": "3"}, "num_beams is '3'; give a whole number"),
        ({}, {"length_penalty": float("nan")}, "length_penalty is nan; give a number"),
    ],
)  # fmt: skip
def test_given_options_that_would_do_nothing(own: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        SamplingParams.options(own, given)


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (SEARCHED, {}, SEARCHED),
        (SEARCHED, {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}, SEARCHED),
        # A seed asks that an answer comes again, as it does; and temperature 0 says that nothing is drawn.
        (SEARCHED, {"seed": 1}, SEARCHED | {"seed": 1}),
        (DRAWN, {"temperature": 0, "min_p": 0.1}, DRAWN | {"temperature": 0, "min_p": 0.1}),
        (SEARCHED, {"length_penalty": 2.0}, SEARCHED | {"length_penalty": 2.0}),
        ({}, {"length_penalty": 1.0}, {}),
        (DRAWN, {"top_k": 5, "seed": 2}, DRAWN | {"top_k": 5, "seed": 2}),
    ],
)
def test_other_options_are_as_before(own: Any, given: dict[str, Any], expected: dict[str, Any]) -> None:
    """A value that asks for nothing does no harm, and each default may be replaced alone."""
    assert SamplingParams.of(SamplingParams.options(own, given)) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        (DRAWN, {"num_beams": 1}, DRAWN | {"num_beams": 1}),
        (DRAWN | {"repetition_penalty": 1.1}, {"num_beams": 3}, {"num_beams": 3}),
        (SEARCHED, {"temperature": 1.0}, {"temperature": 1.0}),
        (SEARCHED, {"num_beams": 1}, {"num_beams": 1}),
    ],
)
def test_defaults_go_with_what_turns_them_off(own: Any, given: dict[str, Any], expected: Any) -> None:
    assert SamplingParams.options(own, given) == expected
