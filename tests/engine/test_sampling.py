"""Sampling against transformers' logits processors, and the promises that they do not make."""

from __future__ import annotations

import pytest
import torch

from pumice import InputError
from pumice.engine.sampling import SamplingParams, nucleus, penalise, sample

VOCABULARY = 200


def logits(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 4


def generators(rows: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for _ in range(rows)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [
        (1, 0, 1, 1),
        (0.3, 0, 1, 1.2),
        (1.7, 5, 1, 0.8),
        (0.7, 0, 0.6, 1),
        (1.3, 40, 0.9, 1.5),
        (1, 1, 1e-6, 1),
    ],
)
def test_equals_transformers(temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    history = torch.randint(0, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(2))
    reference = logits()
    steps = [transformers.RepetitionPenaltyLogitsProcessor(float(penalty))]
    steps.append(transformers.TemperatureLogitsWarper(float(temperature)))
    steps += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    steps += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for step in steps:
        reference = step(history, reference)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    actual = nucleus(penalise(logits(), penalty, history.tolist()), params)
    torch.testing.assert_close(actual.softmax(-1), reference.softmax(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(actual.isinf(), reference.isinf())


def test_greedy_is_the_argmax_whatever_else_is_set() -> None:
    params = SamplingParams(temperature=0, top_p=0.1, top_k=3)
    assert torch.equal(sample(logits(), params, [[]] * 3, generators(3)), logits().argmax(-1))


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    drawn = sample(logits(), SamplingParams(temperature=1e-30), [[]] * 3, generators(3))
    assert torch.equal(drawn, logits().argmax(-1))


def test_the_nucleus_is_never_empty() -> None:
    flat = torch.zeros(2, VOCABULARY)
    finite_counts = nucleus(flat, SamplingParams(temperature=1, top_p=1e-9)).isfinite().sum(-1)
    assert finite_counts.tolist() == [1, 1]


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    rows = probabilities.log().expand(4000, 3)
    shared = torch.Generator().manual_seed(0)
    drawn = sample(rows, SamplingParams(temperature=1), [[]] * 4000, [shared] * 4000)
    # three standard deviations of 4000 draws are 0.024
    torch.testing.assert_close(drawn.bincount() / 4000, probabilities, atol=0.024, rtol=0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    params = SamplingParams(temperature=1.5)
    together = sample(logits(), params, [[]] * 3, generators(3, seed=7))
    alone = [sample(row[None], params, [[]], generators(1, seed=7)) for row in logits()]
    assert torch.equal(together, torch.cat(alone))


def test_the_penalty_ignores_image_placeholders_and_leaves_its_input_alone() -> None:
    original = logits(1)
    changed = penalise(original, 2.0, [[-200, 3, 3]])
    assert (changed != original).nonzero().tolist() == [[0, 3]]
    assert torch.equal(original, logits(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("max_new_tokens", True), ("temperature", -0.1),
        ("temperature", float("nan")), ("temperature", "warm"), ("top_p", 0), ("top_p", 1.1), ("top_k", -1),
        ("repetition_penalty", 0), ("seed", -1), ("stop", ("",)), ("stop", (3,)),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        SamplingParams(**{field: value})
