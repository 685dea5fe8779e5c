"""The cached, batched engine against the naive one, token for token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small import VOCABULARY, WIDTH, small_model
from torch import Tensor

from pumice import InputError
from pumice.config import IMAGE_TOKEN
from pumice.engine.generate import generate, naive_generate
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.model.llava import Llava

N = 4  # image tokens of one picture


@pytest.fixture(scope="module")
def model() -> Llava:
    return small_model()


def prompt(length: int, pictures: int = 0, seed: int = 0, **sampling: object) -> Prompt:
    """Text of `length` tokens with `pictures` pictures among it."""
    random = torch.Generator().manual_seed(seed)
    pieces = [torch.randint(0, VOCABULARY, (length,), generator=random)]
    for _ in range(pictures):
        pieces += [torch.full((N,), IMAGE_TOKEN), torch.randint(0, VOCABULARY, (2,), generator=random)]
    tokens = torch.randn(pictures, N, WIDTH, generator=random) if pictures else None
    return Prompt(torch.cat(pieces), tokens, SamplingParams(**{"max_new_tokens": 20, **sampling}))


def answers(model: Llava, prompts: list[Prompt], slots: int) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    for number, token in generate(model, prompts, slots=slots):
        assert number not in ended
        if token is None:
            ended.add(number)
        else:
            written[number].append(token)
    assert ended == set(range(len(prompts)))
    return written


MIXED = [(5, 0), (17, 1), (2, 2), (1, 0), (30, 3), (9, 1)]


@pytest.mark.parametrize(("length", "pictures"), MIXED)
def test_cached_equals_naive(model: Llava, length: int, pictures: int) -> None:
    question = prompt(length, pictures)
    (answer,) = answers(model, [question], 1)
    assert answer == naive_generate(model, question)
    assert len(answer) == 20


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_batched_equals_naive(model: Llava, slots: int) -> None:
    questions = [
        prompt(length, pictures, seed=i, max_new_tokens=5 + 4 * i)
        for i, (length, pictures) in enumerate(MIXED)
    ]
    assert answers(model, questions, slots) == [naive_generate(model, p) for p in questions]


@pytest.mark.parametrize("more", [{"qkv_bias": True}, {"qk_norm": True}, {"tied_head": True}])
def test_other_families(more: dict[str, bool]) -> None:
    other = small_model(**more)
    questions = [prompt(6, 1, seed=1), prompt(11, seed=2)]
    assert answers(other, questions, 2) == [naive_generate(other, p) for p in questions]


def test_sliding_window() -> None:
    narrow = small_model(window=7)
    questions = [prompt(12, 1), prompt(3, seed=4)]
    assert answers(narrow, questions, 2) == [naive_generate(narrow, p) for p in questions]
    assert answers(narrow, questions[:1], 1)[0] == naive_generate(narrow, questions[0])
    assert answers(narrow, questions, 2)[0] != answers(small_model(), questions, 2)[0]


def test_a_seed_draws_the_same_alone_and_in_a_batch(model: Llava) -> None:
    questions = [
        Prompt(prompt(4 + i, seed=i).input_ids, None, SamplingParams(20, temperature=1.5, top_p=0.9, seed=i))
        for i in range(4)
    ]
    first = answers(model, questions, 3)
    assert (
        first
        == [answers(model, [p], 1)[0] for p in questions]
        == [naive_generate(model, p) for p in questions]
    )
    other = Prompt(questions[0].input_ids, None, SamplingParams(20, temperature=1.5, top_p=0.9, seed=99))
    assert naive_generate(model, other) != first[0]


def test_without_a_seed_draws_differ(model: Llava) -> None:
    question = prompt(4, temperature=2.0)
    assert answers(model, [question], 1)[0] != answers(model, [question], 1)[0]


def test_the_repetition_penalty_sees_prompt_and_answer(model: Llava) -> None:
    question = prompt(4, 1, repetition_penalty=1e6)
    ids = answers(model, [question], 1)[0]
    assert len(set(ids)) == 20
    assert not set(ids) & set(question.input_ids.tolist())
    assert ids == naive_generate(model, question)


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(model: Llava) -> None:
    free = naive_generate(model, prompt(5))
    stopping = small_model(stops=(free[6], free[9]))
    end = min(free.index(free[6]), free.index(free[9]))
    (answer,) = answers(stopping, [prompt(5)], 1)
    assert answer == free[:end]
    immediately = small_model(stops=(free[0],))
    (answer,) = answers(immediately, [prompt(5)], 1)
    assert answer == []


def test_the_context_ends_an_answer() -> None:
    small = small_model(context=16)
    question = prompt(10)
    (answer,) = answers(small, [question], 1)
    assert len(answer) == 6
    assert answer == naive_generate(small, question)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"takes 16 tokens .* context of 16"):
        answers(small_model(context=16), [prompt(16)], 1)


def test_prompts_are_taken_only_when_a_slot_is_free(model: Llava) -> None:
    taken = 0

    def prompts() -> Iterator[Prompt]:
        nonlocal taken
        for i in range(6):
            taken += 1
            yield prompt(3, seed=i, max_new_tokens=4)

    finished = 0
    for _, token in generate(model, prompts(), slots=2):
        assert taken <= finished + 2
        finished += token is None
    assert (taken, finished) == (6, 6)


def test_image_tokens_matter_and_are_counted(model: Llava) -> None:
    question = prompt(5, 1)
    other = Prompt(question.input_ids, torch.zeros(1, N, WIDTH), question.params)
    assert naive_generate(model, question) != naive_generate(model, other)
    short: Tensor = torch.zeros(1, N - 1, WIDTH)
    with pytest.raises(ValueError, match="hold 4 image placeholders, the pictures give 3 tokens"):
        naive_generate(model, Prompt(question.input_ids, short, question.params))
