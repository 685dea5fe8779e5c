"""CIDEr-D (arXiv 1411.5726, section 5), the number that papers print as "CIDEr".

Equal to pycocoevalcap's `Cider` on the same words: n-grams up to 4, sigma 6, times 10, the document
frequency taken from the references being scored. Does not know: pictures, models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pumice.errors import InputError
from pumice.evaluate.metrics.ptb import tokenize

N = 4  # longest n-gram
SIGMA = 6.0  # of the penalty on a difference in length, n-grams

Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    weights: tuple[dict[Gram, float], ...]  # tf-idf of the n-grams of each order 1..N
    norms: tuple[float, ...]
    length: int  # of the caption in bigrams: the official scorer counts these, not words


class Cider:
    """A corpus of references, prepared once, that scores any number of systems.

    references: for each picture, its captions as people wrote them. Raises InputError when a picture
    has none. One picture alone scores 0 whatever is said: every n-gram then stands in every document.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        counts = [[_count(caption) for caption in captions] for captions in references]
        for number, captions in enumerate(counts):
            if not captions:
                raise InputError(f"picture {number} has no reference captions; give at least one")
        self._frequency = Counter(gram for captions in counts for gram in set().union(*captions))
        self._rarest = math.log(max(1, len(counts)))
        self._references = [[self._vector(count) for count in captions] for captions in counts]

    def score(self, captions: Sequence[str]) -> list[float]:
        """One score per picture, 0 to 10; their mean is the CIDEr of the corpus (1.0 is "100" in papers).

        captions: one per picture, in the references' order. Raises InputError on another number.
        """
        if len(captions) != len(self._references):
            raise InputError(
                f"{len(captions)} captions for {len(self._references)} pictures; give one for each"
            )
        return [self._score(_count(c), refs) for c, refs in zip(captions, self._references, strict=True)]

    def _score(self, count: Counter[Gram], references: Sequence[_Vector]) -> float:
        said = self._vector(count)
        return 10 * sum(_similarity(said, reference) for reference in references) / len(references)

    def _vector(self, count: Counter[Gram]) -> _Vector:
        weights: tuple[dict[Gram, float], ...] = tuple({} for _ in range(N))
        for gram, times in count.items():
            idf = self._rarest - math.log(max(1, self._frequency[gram]))
            weights[len(gram) - 1][gram] = times * idf
        norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in weights)
        return _Vector(weights, norms, sum(times for gram, times in count.items() if len(gram) == 2))


def _count(caption: str) -> Counter[Gram]:
    words = tokenize(caption)
    return Counter(tuple(words[i : i + n]) for n in range(1, N + 1) for i in range(len(words) - n + 1))


def _similarity(said: _Vector, reference: _Vector) -> float:
    """Mean over the orders of the cosine, clipped so that saying a word twice earns nothing."""
    total = 0.0
    for ours, theirs, norm, other in zip(
        said.weights, reference.weights, said.norms, reference.norms, strict=True
    ):
        if norm and other:
            common = ours.keys() & theirs.keys()
            total += sum(min(ours[g], theirs[g]) * theirs[g] for g in common) / (norm * other)
    difference = said.length - reference.length
    return total / N * math.exp(-(difference**2) / (2 * SIGMA**2))
