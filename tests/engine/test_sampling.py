"""Sampling against transformers' logits processors, and the promises that they do not make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pumice import InputError
from pumice.engine import sampling
from pumice.engine.sampling import SamplingParams, _pick, likeliest, penalise, sample

VOCABULARY = 200


def logits(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 4


def generators(rows: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for _ in range(rows)]


def draw(
    rows: torch.Tensor, params: SamplingParams, history: np.ndarray | None = None, seed: int = 0
) -> torch.Tensor:
    """One call for all rows, which share params and history."""
    count = len(rows)
    histories = [np.array([], np.int64) if history is None else history] * count
    return sample(rows, [params] * count, histories, generators(count, seed))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    [
        (1, 0, 1, 0, 1),
        (0.3, 0, 1, 0, 1.2),
        (1.7, 5, 1, 0, 0.8),
        (0.7, 0, 0.6, 0, 1),
        (1.3, 40, 0.9, 0, 1.5),
        (1, 1, 1e-6, 0, 1),
        (2.5, 0, 1, 0.05, 1),
        (2.5, 30, 0.8, 0.1, 1),
        (9, 0, 0.97, 0, 1),  # beyond the likeliest that are selected first
    ],
)
def test_the_set_of_tokens_equals_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    transformers = pytest.importorskip("transformers")
    history = torch.randint(0, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(2))
    reference = logits(1)
    steps = [transformers.RepetitionPenaltyLogitsProcessor(float(penalty))]
    steps.append(transformers.TemperatureLogitsWarper(float(temperature)))
    steps += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    steps += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    for step in steps:
        reference = step(history, reference)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    draws = 4000
    drawn = sample(
        logits(1).expand(draws, VOCABULARY),
        [params] * draws,
        [history[0].numpy()] * draws,
        [torch.Generator().manual_seed(0)] * draws,
    )
    expected = reference.softmax(-1)[0]
    assert (expected[drawn] > 0).all()
    # five standard deviations, or four draws of 4000; a token that should be drawn 30 times or more is drawn
    deviation = (expected * (1 - expected) / draws).sqrt()
    found = drawn.bincount(minlength=VOCABULARY) / draws
    assert ((found - expected).abs() <= 5 * deviation + 4 / draws).all()
    assert ((found > 0) | (expected * draws < 30)).all()


def test_extreme_settings_give_a_token_and_leave_the_other_rows_alone() -> None:
    """Every value at the ends of its range; the other rows stay what they are alone."""
    usual = SamplingParams(temperature=1.0, top_p=0.9, seed=3)
    history = np.arange(VOCABULARY)
    for name, value in (
        ("top_p", 5e-324), ("top_p", 1e-30), ("min_p", 1.0), ("temperature", 5e-324), ("temperature", 1e308),
        ("repetition_penalty", 0.01), ("repetition_penalty", 1e6), ("top_k", 2**62),
    ):  # fmt: skip
        params = [SamplingParams(**{"temperature": 1.0, name: value}), usual]
        rows = logits(2)
        tokens = sample(rows, params, [history] * 2, generators(2))
        assert 0 <= tokens[0] < VOCABULARY, (name, value)
        if name in ("top_p", "min_p") or value == 5e-324:
            assert tokens[0] == rows[0].argmax(), (name, value)
        assert tokens[1] == draw(rows[1:], usual, history)[0], (name, value)


@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}])
def test_no_temperature_draws_what_is_forbidden(more: dict[str, float]) -> None:
    """1e39 is infinite in fp32."""
    allowed = torch.arange(VOCABULARY) % 100 == 3
    for temperature in (5e-324, 1.0, 3e38, 1e39, 1e308):
        params = [SamplingParams(temperature=temperature, **more)] * 40
        rows, histories = logits(1).expand(40, -1), [np.array([], np.int64)] * 40
        seeds = [torch.Generator().manual_seed(seed) for seed in range(40)]
        assert allowed[sample(rows, params, histories, seeds, [allowed] * 40)].all(), temperature


def test_a_gpu_takes_any_top_k_too() -> None:
    """One beyond 64 bits must not fail the batch."""
    params = [SamplingParams(temperature=1, top_k=top_k) for top_k in (10**30, 1)]
    rows = logits(1).softmax(-1).expand(2, -1)
    drawn = sampling._draw_sorted(rows, params, torch.tensor([0.999, 0.999]))
    assert drawn[0] != drawn[1] == rows[1].argmax()


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.999}])
def test_a_row_that_is_not_finite_leaves_the_others_alone(more: dict[str, float], spoiled: float) -> None:
    """The engine ends such a request; those beside it go on."""
    params = SamplingParams(**{"temperature": 9.0, **more})
    rows = logits(3)
    expected = draw(rows, params)
    for place in (slice(None), slice(7, 8)):
        changed = rows.clone()
        changed[1, place] = spoiled
        assert draw(changed, params)[[0, 2]].tolist() == expected[[0, 2]].tolist()


@pytest.mark.parametrize("tries", [0, 1, 16])
def test_of_equally_likely_tokens_as_many_are_drawn_as_top_p_says(
    monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    """Logits in 16 bits have many ties. However a token is found, the set is the smallest one."""
    monkeypatch.setattr(sampling, "LIKELIEST", 4)
    monkeypatch.setattr(sampling, "TRIES", tries)
    row = torch.tensor([2.0] * 8 + [1.0] * 40)
    count = 4000
    one_each = [torch.Generator().manual_seed(seed) for seed in range(count)]
    params = [SamplingParams(temperature=1, top_p=0.6)] * count
    drawn = sample(row.expand(count, -1), params, [np.array([], np.int64)] * count, one_each)
    probabilities = row.softmax(-1)
    size = int((probabilities.cumsum(0) - probabilities < 0.6).sum())
    assert sorted(set(drawn.tolist())) == list(range(size))


def test_of_equally_likely_tokens_a_gpu_takes_the_lower_ids_too() -> None:
    row, count = torch.tensor([1.0] * 40 + [2.0] * 8).softmax(-1), 1000
    params = [SamplingParams(temperature=1, top_p=0.6)] * count
    numbers = torch.linspace(0, 1 - 2**-24, count)
    drawn = sampling._draw_sorted(row.expand(count, -1), params, numbers)
    size = int((row.flip(0).cumsum(0) - row.flip(0) < 0.6).sum())
    assert sorted(set(drawn.tolist())) == [*range(size - 8), *range(40, 48)]


@pytest.mark.parametrize("tries", [0, 1, 16])
@pytest.mark.parametrize(("top_p", "min_p"), [(0.8, 0), (1, 0.3), (0.9, 0.2)])
def test_draws_from_a_wide_set_follow_its_probabilities(
    monkeypatch: pytest.MonkeyPatch, tries: int, top_p: float, min_p: float
) -> None:
    monkeypatch.setattr(sampling, "LIKELIEST", 4)
    monkeypatch.setattr(sampling, "TRIES", tries)
    row = torch.linspace(0, 2, 40)
    count = 20_000
    params = SamplingParams(temperature=1, top_p=top_p, min_p=min_p)
    one_each = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn = sample(row.expand(count, -1), [params] * count, [np.array([], np.int64)] * count, one_each)

    probabilities = row.softmax(-1)
    likelier = probabilities.flip(0).cumsum(0).flip(0) - probabilities
    expected = probabilities * (likelier < top_p) * (probabilities >= min_p * probabilities.max())
    expected /= expected.sum()
    shares = torch.bincount(drawn, minlength=40) / count
    assert torch.all(shares[expected == 0] == 0)
    # Five standard deviations of a share.
    assert torch.all((shares - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-9)


@pytest.mark.parametrize(("vocabulary", "count"), [(200, 64), (4_096, 1), (9_999, 64), (9_999, 5_000)])
@pytest.mark.parametrize("descending", [False, True])
def test_the_likeliest_equal_those_of_a_sort(vocabulary: int, count: int, descending: bool) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(vocabulary, generator=random) for _ in range(5)]).float()
    if descending:  # the likeliest are all neighbours
        rows = rows.sort(-1, descending=True).values
    values, ids = likeliest(rows, count)
    expected = rows.sort(-1, descending=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(ids, expected.indices[:, :count])


@pytest.mark.parametrize("more", [{"top_p": 0.9}, {"min_p": 0.01}])
def test_a_large_vocabulary_is_not_sorted(more: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where few tokens hold most of the probability, nor where thousands do."""
    widths: list[int] = []

    def counted(plain: Any) -> Any:
        def order(x: torch.Tensor, *more: Any, **options: Any) -> Any:
            widths.append(x.shape[-1])
            return plain(x, *more, **options)

        return order

    for name in ("sort", "argsort", "topk"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    rows = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
    draw(rows * torch.tensor([[0.1], [1.0], [9.0]]), SamplingParams(temperature=1, **more))
    assert 0 < max(widths) < 10_000


def test_greedy_is_the_argmax_whatever_else_is_set() -> None:
    params = SamplingParams(temperature=0, top_p=0.1, top_k=3)
    assert torch.equal(draw(logits(), params), logits().argmax(-1))


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    assert torch.equal(draw(logits(), SamplingParams(temperature=1e-30)), logits().argmax(-1))


def test_the_nucleus_is_never_empty() -> None:
    flat = torch.zeros(2, VOCABULARY)
    assert len(set(draw(flat, SamplingParams(temperature=1, top_p=1e-9)).tolist())) == 1


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    rows = probabilities.log().expand(4000, 3)
    shared = [torch.Generator().manual_seed(0)] * 4000
    drawn = sample(rows, [SamplingParams(temperature=1)] * 4000, [np.array([])] * 4000, shared)
    # three standard deviations of 4000 draws are 0.024
    torch.testing.assert_close(drawn.bincount() / 4000, probabilities, atol=0.024, rtol=0)


def test_the_largest_random_number_draws_a_token_that_may_be_drawn() -> None:
    weights = torch.tensor([[0.25, 0.5, 0.0], [1.0, 0.0, 0.0], [1.9, 0.05, 0.0]])
    assert _pick(weights, torch.full((3,), 1 - 2.0**-24)).tolist() == [1, 0, 1]
    assert _pick(weights, torch.zeros(3)).tolist() == [0, 0, 0]
    assert _pick(torch.tensor([[0.0, 1.0]]), torch.zeros(1)).tolist() == [1]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Rows that are sampled in different ways, in one call and one by one."""
    params = [
        SamplingParams(temperature=1.5),
        SamplingParams(),
        SamplingParams(temperature=9, top_p=0.95),
        SamplingParams(temperature=2, top_k=7),
        SamplingParams(temperature=3, min_p=0.01, repetition_penalty=1.4),
        SamplingParams(temperature=9, top_p=0.3),
    ]
    allowed = [None, torch.arange(VOCABULARY) % 3 == 0, None, torch.arange(VOCABULARY) % 2 == 0, None, None]
    rows = logits(len(params))
    histories = [np.array([n, 5, 9]) for n in range(len(params))]
    together = sample(rows, params, histories, generators(len(params), seed=7), allowed)
    alone = [
        sample(rows[n : n + 1], [params[n]], [histories[n]], generators(1, seed=7), [allowed[n]])
        for n in range(len(params))
    ]
    assert torch.equal(together, torch.cat(alone))
    assert (together[1] % 3, together[3] % 2) == (0, 0)
    assert torch.equal(rows, logits(len(params)))  # the caller's logits stay


def test_the_penalty_ignores_image_placeholders_and_counts_a_token_once() -> None:
    original, changed = logits(1)[0], logits(1)[0]
    penalise(changed, 2.0, np.array([-200, 3, 3]))
    assert (changed != original).nonzero().tolist() == [[3]]
    value = float(original[3])
    assert float(changed[3]) == pytest.approx(value / 2 if value > 0 else value * 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("max_new_tokens", True), ("temperature", -0.1),
        ("temperature", float("nan")), ("temperature", "warm"), ("top_p", 0), ("top_p", 1.1), ("top_k", -1),
        ("min_p", -0.1), ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-45), ("repetition_penalty", 1e300), ("seed", -1),
        ("stop", ("",)), ("stop", (3,)),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        SamplingParams(**{field: value})


def test_penalties_for_what_the_answer_holds() -> None:
    """As OpenAI's reference defines them: logit - count * frequency - (count > 0) * presence."""
    rows = logits(2)
    history = np.array([3, 3, 7, 8, 7, 7])  # the first three are the prompt
    params = [
        SamplingParams(frequency_penalty=0.5, presence_penalty=-1.5),
        SamplingParams(presence_penalty=2),
    ]
    changed = sampling._restrict(rows, params, [history] * 2, [None] * 2, [3, 6])
    expected = rows.clone()
    expected[0, 7] -= 2 * 0.5 - 1.5
    expected[0, 8] -= 1 * 0.5 - 1.5
    torch.testing.assert_close(changed, expected, atol=1e-6, rtol=0)
    likeliest = int(logits(1).argmax())
    params = [SamplingParams(presence_penalty=2, frequency_penalty=2)]
    repeated = np.array([0] + [likeliest] * 100)
    chosen = sample(logits(1), params, [repeated], generators(1), prompt_lengths=[1])
    assert int(chosen) != likeliest
    assert int(sample(logits(1), params, [repeated], generators(1), prompt_lengths=[101])) == likeliest


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_penalties_out_of_range(name: str) -> None:
    for value in (-2.1, 3, float("nan"), "1"):
        with pytest.raises(InputError, match=name):
            SamplingParams(**{name: value})
