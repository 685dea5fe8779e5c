"""BLEU and ROUGE-L by hand, and against pycocoevalcap where it is installed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pumice.evaluate.metrics.captions import bleu, rouge_l
from pumice.evaluate.metrics.ptb import tokenize

CAPTIONS = ["a dog runs on grass", "two cats.", "", "A man, a plan: a canal!"]
REFERENCES = [
    ["a dog runs on the grass", "the dog is running"],
    ["two cats sleep", "cats on a bed"],
    ["a boat on the sea", "boats"],
    ["a man with a plan", "the canal"],
]


def test_bleu_by_hand() -> None:
    # "a dog runs" against "a dog sits": 2 of 3 words, 1 of 2 pairs, 0 of 1 triple; no brevity penalty.
    scores = bleu(["a dog runs"], [["a dog sits"]])
    assert scores[0] == pytest.approx(2 / 3)
    assert scores[1] == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    assert scores[2] < 1e-4


def test_bleu_is_shorter_by_the_brevity_penalty_and_takes_the_closest_length() -> None:
    # 2 words; the closest reference has 3 (not 6): exp(1 - 3/2).
    scores = bleu(["a dog"], [["a dog runs", "a dog runs on the grass"]])
    assert scores[0] == pytest.approx(math.exp(1 - 3 / 2))


def test_rouge_by_hand() -> None:
    # Longest common part "a dog grass": 3 of 4 words said, 3 of 5 in the reference, beta 1.2.
    precision, recall = 3 / 4, 3 / 5
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l("a dog eats grass", ["a dog on the grass"]) == pytest.approx(expected)
    assert rouge_l("", ["a dog"]) == 0


def test_equal_to_pycocoevalcap() -> None:
    official_bleu: Any = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge: Any = pytest.importorskip("pycocoevalcap.rouge.rouge")
    candidates = {i: [" ".join(tokenize(text))] for i, text in enumerate(CAPTIONS)}
    truth = {i: [" ".join(tokenize(text)) for text in texts] for i, texts in enumerate(REFERENCES)}
    official, _ = official_bleu.Bleu(4).compute_score(truth, candidates, verbose=0)
    assert bleu(CAPTIONS, REFERENCES) == pytest.approx(official, abs=1e-12)
    _, each = rouge.Rouge().compute_score(truth, candidates)
    rouge_scores = [rouge_l(text, texts) for text, texts in zip(CAPTIONS, REFERENCES, strict=True)]
    assert rouge_scores == pytest.approx(list(each), abs=1e-12)
