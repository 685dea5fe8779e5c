"""The engine gives the same tokens as `naive_generate`, whatever else it computes at the time.

In fp32 a pass over other tokens at once rounds otherwise, so two logits that are equal to about 1e-5 could
change places; the models here have weights so large that their logits are far apart.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import VOCABULARY, WIDTH, small_model

from pumice import InputError
from pumice.config import IMAGE_TOKEN
from pumice.engine import engine as engine_module
from pumice.engine import scheduler as scheduling
from pumice.engine.engine import Engine
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Delta, Prompt, PromptImage, Request
from pumice.engine.sampling import SamplingParams
from pumice.errors import WorkError
from pumice.model.llava import Llava
from pumice.model.quantized import quantize


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
    """What tests of the engine are engine of."""

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


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="session")
def model() -> Llava:
    return small_model()


@pytest.fixture
def make_engine(model: Llava) -> Callable[..., Engine]:
    return lambda **options: Engine(model, **options)


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


@pytest.mark.parametrize("wrong", [MemoryError, KeyboardInterrupt])
def test_a_copy_that_fails_or_is_interrupted_loses_no_block(
    wrong: type[BaseException], kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a prompt begins with a part of a block that another one has computed."""
    large = small_model(context=400)
    shares = kit.prompt(*range(5, 50), 99, max_new_tokens=3)
    expected = naive_generate(large, shares)
    engine = Engine(large, slots=2, cache_tokens=300)

    def fail(*_: int) -> None:
        raise wrong("no memory")

    kit.run(engine, kit.prompt(*range(5, 100), max_new_tokens=1))
    received = kit.submit(engine, shares)
    with monkeypatch.context() as patch:
        patch.setattr(engine._prefix_cache, "_copy", fail)
        if wrong is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                while engine.step():
                    pass
        else:
            while engine.step():
                pass
            assert (received.last.finish, str(received.last.error)) == ("error", "no memory")
            check_owners(engine)
            received = kit.submit(engine, shares)
    while engine.step():
        check_owners(engine)
    assert (received.tokens, received.last.finish) == (expected, "length")
    assert received.last.cached_tokens == 45


def test_a_request_that_cannot_be_started_ends_with_a_reason(
    kit: Kit, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    ended = threading.Event()
    received: list[Delta] = []

    def deliver(delta: Delta) -> None:
        received.append(delta)
        ended.set()

    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "_start", lambda *_: False)
        engine.start()
        engine.submit(PROMPTS[0], deliver)
        assert ended.wait(60)
    assert (received[0].finish, str(received[0].error)) == (
        "error",
        "1 requests wait, and none of them can be started",
    )
    engine.close()


def test_a_model_that_changed_is_not_mixed_with_what_it_said_before(kit: Kit) -> None:
    model = small_model()
    engine = Engine(model)
    kit.run(engine, PROMPTS[2])
    with torch.no_grad():
        model.decoder.blocks[0].mlp.down.weight.neg_()
    engine.forget()
    assert kit.run(engine, PROMPTS[2])[0].tokens == naive_generate(model, PROMPTS[2])


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


def test_a_picture_that_fails_ends_its_own_request_only(kit: Kit, make_engine: Callable[..., Engine]) -> None:
    def encode() -> torch.Tensor:
        raise InputError("the picture is torn")

    bad, good = kit.run(make_engine(), kit.prompt(1, PromptImage("torn", 4, encode), 2), PROMPTS[2])
    assert (bad.last.finish, str(bad.last.error), bad.tokens) == ("error", "the picture is torn", [])
    assert good.tokens == EXPECTED[None][2]


@pytest.mark.parametrize("found", [3, 5])
def test_a_picture_of_another_size_ends_its_own_request_only(
    found: int, kit: Kit, make_engine: Callable[..., Engine]
) -> None:
    wrong = PromptImage("wrong", 4, lambda: torch.zeros(found, WIDTH))
    bad, good = kit.run(make_engine(), kit.prompt(1, wrong, 2), PROMPTS[2])
    assert str(bad.last.error) == f"a picture has 4 placeholders and {found} image tokens"
    assert good.tokens == EXPECTED[None][2]


def test_what_was_computed_beside_nan_is_not_kept(kit: Kit, make_engine: Callable[..., Engine]) -> None:
    """Text before a broken picture may be spoiled too: a weight of zero times NaN is NaN."""
    text = [n % 100 for n in range(60)]
    nan = PromptImage("nan", 4, lambda: torch.full((4, WIDTH), torch.nan))
    engine = make_engine()
    [bad] = kit.run(engine, kit.prompt(*text, nan, 2))
    assert (bad.last.finish, type(bad.last.error)) == ("error", WorkError)
    prompt = kit.prompt(*text, 7)
    [good] = kit.run(engine, prompt)
    assert good.tokens == naive_generate(engine.model, prompt)
    assert good.last.cached_tokens == 0


class FailingConstraint:
    """Allows every token, and fails at the third, when it is asked (`allowed`) or told (`accept`)."""

    def __init__(self, method: str) -> None:
        self.method, self.tokens = method, 0

    def allowed(self) -> torch.Tensor:
        if self.method == "allowed" and self.tokens == 2:
            raise InputError("nothing can follow")
        return torch.ones(VOCABULARY, dtype=torch.bool)

    def accept(self, token: int) -> None:
        self.tokens += 1
        if self.method == "accept" and self.tokens == 3:
            raise InputError("nothing can follow")


@pytest.mark.parametrize("method", ["allowed", "accept"])
def test_a_constraint_that_fails_ends_its_own_request_only(
    kit: Kit, make_engine: Callable[..., Engine], method: str
) -> None:
    held = replace(PROMPTS[0], constraint=lambda: FailingConstraint(method))
    bad, good = kit.run(make_engine(), held, PROMPTS[2])
    assert (bad.last.finish, str(bad.last.error)) == ("error", "nothing can follow")
    assert bad.tokens == EXPECTED[None][0][:2]
    assert good.tokens == EXPECTED[None][2]


def test_a_pass_that_fails_ends_the_requests_in_it_and_the_next_work(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    engine = Engine(model)
    first = kit.submit(engine, PROMPTS[0])
    engine.step()

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "logits", fail)
        engine.step()
    assert (first.last.finish, str(first.last.error)) == ("error", "no memory")
    assert kit.run(engine, PROMPTS[0])[0].tokens == EXPECTED[None][0]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_long_prompt_is_read_in_parts_with_few_bits_too(kind: str, kit: Kit) -> None:
    """A step that no answer is due after has nothing for the last block's output to do."""
    model = small_model(mlp_width=64)
    quantize(model.decoder, kind)
    answers = [kit.run(Engine(model, chunk=chunk), PROMPTS[1])[0] for chunk in (3, 512)]
    assert [one.last.error for one in answers] == [None, None]
    assert answers[0].tokens[0] == answers[1].tokens[0]  # later ones may differ: bfloat16 rounds otherwise


def test_an_interrupted_step_is_done_again(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C interrupts it, at either end of the pass."""
    model = small_model()
    engine = Engine(model)
    received = [kit.submit(engine, PROMPTS[n]) for n in (0, 2)]
    engine.step()

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    for owner, name in ((model.decoder, "logits"), (engine, "_choose"), (model.decoder, "forward")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
    while engine.step():
        pass
    assert [one.tokens for one in received] == [EXPECTED[None][n] for n in (0, 2)]


def test_an_owner_that_fails_ends_its_own_request_only(
    kit: Kit, make_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(delta: Delta) -> None:
        raise RuntimeError("the connection is gone")

    engine = make_engine()
    engine.submit(PROMPTS[3], fail)
    assert kit.run(engine, PROMPTS[0])[0].tokens == EXPECTED[None][0]
    assert engine.stats().generated_tokens == 1 + len(EXPECTED[None][0])
    assert "the connection is gone" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda kit: kit.prompt(*range(96)), "takes 96 tokens .* context of 96"),
        (lambda kit: kit.prompt(*range(30), max_new_tokens=30), "30 tokens and an answer of up to 30 .* 50"),
        (lambda kit: kit.prompt(*range(51), max_new_tokens=1), "takes 51 tokens and the .* cache holds 50"),
        (lambda kit: kit.prompt(*range(50), max_new_tokens=2), "50 tokens .* up to 2 .* 50 .* at most 1,"),
        (lambda kit: Prompt(torch.empty(0, dtype=torch.long)), "0 tokens; give at least 1"),
        (lambda kit: kit.prompt(1, 101), "from 1 to 101, the vocabulary from 0 to 100"),
        (lambda kit: Prompt(torch.tensor([1, -200, 2])), "hold 1 image placeholders, the pictures give 0"),
    ],
)
def test_what_can_never_be_answered_is_refused(
    kit: Kit, make_engine: Callable[..., Engine], wrong: Callable[[Kit], Prompt], message: str
) -> None:
    engine = make_engine(cache_tokens=50)
    with pytest.raises(ValueError, match=message):
        kit.submit(engine, wrong(kit))
    assert not engine.step()


def test_a_prompt_as_long_as_the_cache_is_answered(kit: Kit, model: Llava) -> None:
    asked = kit.prompt(*range(50), max_new_tokens=1)
    assert kit.run(Engine(model, cache_tokens=50), asked)[0].tokens == naive_generate(model, asked)


@pytest.mark.parametrize("options", [{"slots": 0}, {"chunk": 0}, {"cache_tokens": 0}])
def test_wrong_options(make_engine: Callable[..., Engine], options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is 0; give 1 or more"):
        make_engine(**options)


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
