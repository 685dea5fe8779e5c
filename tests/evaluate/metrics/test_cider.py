"""CIDEr against values computed by hand, against pycocoevalcap, and under what must not change it."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.errors import InputError
from pumice.evaluate.metrics.cider import Cider

REFERENCES = [
    ["a dog runs on grass", "the brown dog runs over a field"],
    ["a man rides a red bike", "someone on a bike in the street", "a cyclist"],
    ["two children play with a ball", "kids playing"],
]
CAPTIONS = ["a dog runs on grass", "a man on a bike in the street", "a dog"]


def test_two_words_by_hand() -> None:
    """Every n-gram stands in one of two documents: idf log 2, which cancels in the cosine.

    Saying "a b" to "a b" is cosine 1 for n = 1, 2 and nothing for n = 3, 4: 10 * 2 / 4. Saying "c d e"
    to "c d" shares two of three words and one of two bigrams, and is one bigram too long.
    """
    [first, second] = Cider([["a b"], ["c d"]]).score(["a b", "c d e"])
    assert first == pytest.approx(5.0)
    cosines = 2 / (math.sqrt(3) * math.sqrt(2)) + 1 / math.sqrt(2)
    assert second == pytest.approx(10 * cosines / 4 * math.exp(-1 / 72))


def test_words_said_twice_are_clipped() -> None:
    """ "a a" to "a": one unigram counts, min(2, 1) * 1 / (2 * 1); the bigram is not in the reference."""
    [score, _] = Cider([["a"], ["b"]]).score(["a a", "b"])
    assert score == pytest.approx(10 * (1 / 2) / 4 * math.exp(-1 / 72))


def test_a_word_in_every_picture_weighs_nothing() -> None:
    assert Cider([["a dog"], ["a cat"]]).score(["a", "a"]) == [0, 0]


def test_identical_captions_score_ten() -> None:
    references = [["a dog runs on grass"], ["two men ride bikes"], ["the red boat sails away"]]
    captions_in_capitals = [captions[0].upper() + "!" for captions in references]
    assert Cider(references).score(captions_in_capitals) == pytest.approx([10, 10, 10])


def test_one_picture_and_silence_score_zero() -> None:
    assert Cider([["a dog runs on grass"]]).score(["a dog runs on grass"]) == [0]
    assert Cider(REFERENCES).score(["", "...", "zebra"]) == [0, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocoevalcap(seed: int) -> None:
    scorer = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs the extra 'metrics'")
    draw = random.Random(seed)
    words = ["a", "the", "dog", "man", "bike", "red", "two", "runs", "on", "in", "grass", "street", "ball"]

    def sentence() -> str:
        return " ".join(draw.choices(words, weights=range(len(words), 0, -1), k=draw.randint(1, 14)))

    references = [[sentence() for _ in range(draw.randint(1, 5))] for _ in range(60)]
    captions = [sentence() if draw.random() < 0.5 else draw.choice(refs) for refs in references]
    captions[7] = ""
    official_score, official_scores = scorer.Cider().compute_score(
        dict(enumerate(references)), {number: [caption] for number, caption in enumerate(captions)}
    )
    our_scores = Cider(references).score(captions)
    # Worst difference measured: 9e-16, from another order of summation.
    assert our_scores == pytest.approx(official_scores.tolist(), rel=1e-12, abs=1e-12)
    assert statistics.fmean(our_scores) == pytest.approx(float(official_score), rel=1e-12)


OFFICIAL = [5.830601094657341, 2.929659689494104, 0.0]


def test_the_official_numbers_of_a_small_corpus() -> None:
    """pycocoevalcap 1.2 on these captions; stands where it is not installed."""
    assert Cider(REFERENCES).score(CAPTIONS) == pytest.approx(OFFICIAL, rel=1e-9)


@given(st.permutations(range(3)), st.randoms(use_true_random=False))
def test_order_of_pictures_and_references_does_not_matter(order: list[int], draw: random.Random) -> None:
    scores = Cider(REFERENCES).score(CAPTIONS)
    shuffled = [draw.sample(REFERENCES[i], len(REFERENCES[i])) for i in order]
    assert Cider(shuffled).score([CAPTIONS[i] for i in order]) == pytest.approx([scores[i] for i in order])


@given(st.lists(st.text(alphabet="abc .'-()!\n", max_size=30), min_size=3, max_size=3))
def test_any_text_scores_between_zero_and_ten(captions: list[str]) -> None:
    assert all(0 <= score <= 10 + 1e-9 for score in Cider(REFERENCES).score(captions))


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="2 captions for 3 pictures"):
        Cider(REFERENCES).score(["a", "b"])
    with pytest.raises(InputError, match="picture 1 has no reference captions"):
        Cider([["a dog"], []])
