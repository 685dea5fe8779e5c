"""POPE's reading of answers and the counts made from it."""

from __future__ import annotations

import random

import pytest

from pumice.errors import InputError
from pumice.evaluate.metrics.presence import means_yes, presence_score


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


def test_counts_by_hand() -> None:
    """Two hits, one false yes, one miss, one right no."""
    score = presence_score(["Yes.", "Yes", "A dog.", "No", "No."], [True, True, False, True, False])
    assert (score.questions, score.accuracy) == (5, 3 / 5)
    assert score.precision == pytest.approx(2 / 3)
    assert score.recall == pytest.approx(2 / 3)
    assert score.f1 == pytest.approx(2 / 3)
    assert score.yes_rate == 3 / 5
    assert score.unclear == 1 / 5


def test_only_no_divides_nothing_by_nothing() -> None:
    score = presence_score(["No", "No"], [True, False])
    assert (score.precision, score.recall, score.f1, score.yes_rate) == (0, 0, 0, 0)
    assert score.accuracy == 1 / 2


def test_order_does_not_matter() -> None:
    draw = random.Random(0)
    pairs = [(draw.choice(["Yes", "No", "a dog"]), draw.random() < 0.5) for _ in range(50)]
    shuffled = draw.sample(pairs, len(pairs))
    first, second = (presence_score([a for a, _ in p], [t for _, t in p]) for p in (pairs, shuffled))
    assert first == second


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="1 answers for 2 questions"):
        presence_score(["Yes"], [True, False])
    with pytest.raises(InputError, match="0 answers"):
        presence_score([], [])
