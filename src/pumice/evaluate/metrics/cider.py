"""Compute CIDEr-D (arXiv 1411.5726, section 5), the number that papers print as "CIDEr".

It equals pycocoevalcap's `Cider` on the same words: n-grams up to 4, sigma 6, times 10, and document
frequencies from the references that are scored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pumice.errors import InputError, counted
from pumice.evaluate.metrics.ptb import tokenize

N = 4  # longest n-gram
SIGMA = 6.0  # n-grams; width of the penalty on a difference in length

Gram = tuple[str, ...]


@dataclass(frozen=True)
class _TfIdfVector:
    weights: tuple[dict[Gram, float], ...]  # tf-idf of the n-grams of each order 1..N
    norms: tuple[float, ...]
    length: int  # of the caption in bigrams, as in the official scorer


class Cider:
    """A corpus of references that scores the captions of any number of models.

    references: for each image, the captions that people wrote. Raises InputError when an image has none.
    A single image always scores 0, because every n-gram then occurs in every document.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        counts = [[grams(tokenize(caption)) for caption in captions] for captions in references]
        for number, captions in enumerate(counts):
            if not captions:
                raise InputError(f"picture {number} has no reference captions; give at least one")
        self._frequency = Counter(gram for captions in counts for gram in set().union(*captions))
        self._max_idf = math.log(max(1, len(counts)))
        self._references = [[self._vector(count) for count in captions] for captions in counts]

    def score(self, captions: Sequence[str]) -> list[float]:
        """Return a score per image, 0 to 10; the mean is the CIDEr of the corpus (papers print 1.0 as 100).

        captions: one per image, in the order of the references. Raises InputError on another number.
        """
        if len(captions) != len(self._references):
            raise InputError(
                f"{counted(len(captions), 'caption')} for "
                f"{counted(len(self._references), 'picture')}; give one for each"
            )
        return [
            self._score(grams(tokenize(c)), refs) for c, refs in zip(captions, self._references, strict=True)
        ]

    def _score(self, count: Counter[Gram], references: Sequence[_TfIdfVector]) -> float:
        candidate = self._vector(count)
        return 10 * sum(_similarity(candidate, reference) for reference in references) / len(references)

    def _vector(self, count: Counter[Gram]) -> _TfIdfVector:
        weights: tuple[dict[Gram, float], ...] = tuple({} for _ in range(N))
        for gram, times in count.items():
            idf = self._max_idf - math.log(max(1, self._frequency[gram]))
            weights[len(gram) - 1][gram] = times * idf
        norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in weights)
        return _TfIdfVector(weights, norms, sum(times for gram, times in count.items() if len(gram) == 2))


def grams(words: Sequence[str]) -> Counter[Gram]:
    """Return how often each n-gram stands in a text."""
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def _similarity(candidate: _TfIdfVector, reference: _TfIdfVector) -> float:
    """Return the mean cosine over the n-gram orders, times a penalty on a difference in length.

    Weights are clipped to the reference's, so that repeating a word earns nothing.
    """
    total = 0.0
    for weights, reference_weights, norm, reference_norm in zip(
        candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True
    ):
        if norm and reference_norm:
            common = weights.keys() & reference_weights.keys()
            product = sum(min(weights[g], reference_weights[g]) * reference_weights[g] for g in common)
            total += product / (norm * reference_norm)
    difference = candidate.length - reference.length
    return total / N * math.exp(-(difference**2) / (2 * SIGMA**2))
