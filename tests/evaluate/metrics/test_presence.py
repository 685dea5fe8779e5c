"""POPE's reading of answers and the counts made from it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pumice.evaluate.metrics.presence import is_unclear, means_yes, presence_score


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("yes.", True),
        ("Yes, there is no doubt", False),  # "no" in the first sentence
        ("Yes, there is a dog. There is no cat.", True),
        ("No", False),
        ("No.", False),
        ("no, there is not", False),
        ("No, there is no dog in the image.", False),
        ("There is not a dog", False),
        ("I do not, see one", False),
        ("NO", True),
        ("Not at all", True),  # only the lower-case "not" is in POPE's list
        ("No!", True),  # words end at spaces
        ("No\nThere is none", True),
        ("nothing", True),
        ("", True),
        (". No", True),
    ],
)
def test_reads_as_pope_does(answer: str, yes: bool) -> None:
    assert means_yes(answer) is yes


def score(answers: list[str], truths: list[bool], weights: list[int] | None = None) -> dict[str, float]:
    predicted = np.array([means_yes(answer) for answer in answers])
    return presence_score(predicted, np.array(truths), np.array(weights or [1] * len(answers), np.float64))


def test_counts_by_hand() -> None:
    """Two hits, one false yes, one miss, one right no."""
    answers, truths = ["Yes.", "Yes", "A dog.", "No", "No."], [True, True, False, True, False]
    counted = score(answers, truths)
    assert (counted["accuracy"], counted["yes rate"]) == (3 / 5, 3 / 5)
    assert [counted[name] for name in ("precision", "recall", "f1")] == pytest.approx([2 / 3] * 3)
    assert [is_unclear(answer) for answer in answers] == [False, False, True, False, False]


def test_a_weight_repeats_a_question() -> None:
    answers, truths = ["Yes", "No", "a dog", "No"], [True, True, False, False]
    repeated = score([*answers, "No", "No"], [*truths, True, True])
    assert score(answers, truths, [1, 3, 1, 1]) == pytest.approx(repeated)
    assert set(score(answers, truths, [0] * 4).values()) == {0.0}


def test_only_no_divides_nothing_by_nothing() -> None:
    only_no = score(["No", "No"], [True, False])
    assert [only_no[name] for name in ("precision", "recall", "f1", "yes rate")] == [0, 0, 0, 0]
    assert only_no["accuracy"] == 1 / 2


def test_order_does_not_matter() -> None:
    draw = random.Random(0)
    pairs = [(draw.choice(["Yes", "No", "a dog"]), draw.random() < 0.5) for _ in range(50)]
    shuffled = draw.sample(pairs, len(pairs))
    first, second = (score([a for a, _ in p], [t for _, t in p]) for p in (pairs, shuffled))
    assert first == second
