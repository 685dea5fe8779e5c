"""What fails, is interrupted or cannot be answered ends with a reason, and nothing beside it does."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from kit import EXPECTED, PROMPTS, Kit, check_owners, is_interrupted
from small import VOCABULARY, WIDTH, small_model

from pumice import InputError
from pumice.engine import engine as engine_module
from pumice.engine import scheduler as scheduling
from pumice.engine.engine import Engine
from pumice.engine.generate import naive_generate
from pumice.engine.requests import Delta, Prompt, PromptImage
from pumice.errors import WorkError
from pumice.model.llava import Llava


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
        "1 request waits, and none can be started",
    )
    engine.close()


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


def test_an_interruption_at_any_line_loses_no_token(kit: Kit) -> None:
    """As Ctrl-C comes while tokens are chosen and delivered, and requests end."""
    model = small_model()
    prompts = [PROMPTS[0], kit.prompt(3, 4, max_new_tokens=4, temperature=1.0, seed=5), PROMPTS[2]]
    names = ("_deliver_next_tokens", "_choose", "_finish", "_deliver")
    lines = countdown = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines, countdown
        if frame.f_code.co_filename != engine_module.__file__ or frame.f_code.co_name not in names:
            return None if event == "call" else trace
        lines += 1
        countdown -= 1
        if not countdown:
            signal.raise_signal(signal.SIGINT)
        return trace

    def run(interrupted_at: int) -> list[list[int]]:
        nonlocal countdown
        engine = Engine(model)
        received = [kit.submit(engine, prompt) for prompt in prompts]
        countdown = interrupted_at
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert is_interrupted(engine, trace) == bool(interrupted_at)
        finally:
            signal.signal(signal.SIGINT, before)
        while engine.step():
            check_owners(engine)
        assert all(sum(delta.finish is not None for delta in one.deltas) == 1 for one in received)
        return [one.tokens for one in received]

    expected = run(0)
    for line in range(1, lines + 1, 5):
        assert run(line) == expected


class Interrupts(list[Any]):
    """A list that Ctrl-C interrupts before it changes at its end."""

    def append(self, _: Any) -> None:
        raise KeyboardInterrupt

    remove = append


class InterruptsAtOnce(Interrupts):
    extend = Interrupts.append


@pytest.mark.parametrize("place", ["submitted", "to be started", "started", "preempted", "grown"])
@pytest.mark.parametrize("then", ["goes on", "cancels", "closes"])
def test_interrupted_bookkeeping_loses_no_request(
    place: str, then: str, kit: Kit, model: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two answers that do not fit in the cache together, interrupted where one is in no list, or in two."""
    monkeypatch.setattr(engine_module, "BLOCK", 5)
    monkeypatch.setattr(scheduling, "SLOT_GROWTH", 3)
    prompts = [kit.prompt(*range(first, first + 12), max_new_tokens=30) for first in (1, 40)]
    engine = Engine(model, slots=2, cache_tokens=45)
    scheduler = engine._scheduler
    received = [kit.submit(engine, prompts[0])]
    if place == "to be started":
        scheduler.running = Interrupts()
    elif place in ("submitted", "started"):
        waiting: Any = InterruptsAtOnce() if place == "submitted" else Interrupts()
        scheduler.waiting = waiting
    else:
        received.append(kit.submit(engine, prompts[1]))
        engine.step()
    if place == "grown":
        slot: Any = scheduler.running[0].slot
        slot.table = Interrupts(slot.table)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if place == "preempted":
            patch.setattr(scheduler, "_release", Interrupts().append)
        while engine.step():
            pass
    scheduler.running, scheduler.waiting = list(scheduler.running), deque(scheduler.waiting)
    if then == "closes":
        engine.close()
        for one in received:
            assert [delta.finish for delta in one.deltas if delta.finish] == ["cancelled"]
        assert not engine._prefix_cache.busy
        return
    if then == "cancels":
        for one in received:
            assert one.request is not None
            engine.cancel(one.request)
    while engine.step():
        check_owners(engine)
    for one, prompt in zip(received, prompts, strict=False):
        assert one.last.finish == ("cancelled" if then == "cancels" else "length")
        assert then == "cancels" or one.tokens == naive_generate(model, prompt)
    assert kit.run(engine, prompts[1])[0].tokens == naive_generate(model, prompts[1])


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
        (lambda kit: Prompt(torch.tensor([1, -200, 2])), "hold 1 image placeholder, the pictures give 0"),
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
