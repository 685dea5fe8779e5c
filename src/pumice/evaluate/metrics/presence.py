"""Score yes/no answers about what is in an image, as POPE does (arXiv 2305.10355)."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_NO = frozenset(["No", "not", "no"])  # POPE's list, without "NO": POPE reads that as yes
_EITHER = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


def means_yes(answer: str) -> bool:
    """Return False if a word of the first sentence is No, not or no; commas are removed first.

    Every other answer means yes, also an empty one. Words end at spaces only, as in POPE's evaluate.py.
    """
    sentence = answer.split(".", 1)[0].replace(",", "")
    return _NO.isdisjoint(sentence.split(" "))


def is_unclear(answer: str) -> bool:
    """Return whether an answer has neither yes, no nor not; POPE counts it as yes."""
    return _EITHER.search(answer) is None


def presence_score(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], weights: NDArray[np.float64]
) -> dict[str, float]:
    """Return scores as fractions of 1; "yes" is the positive class. A ratio without cases is 0.

    predicted, truth: whether each answer says yes, and each object is in its image. weights: how often each
    question counts.
    """
    hits, said, present = (float((weights * yes).sum()) for yes in (predicted & truth, predicted, truth))
    total = float(weights.sum())
    return {
        "f1": _ratio(2 * hits, said + present),
        "accuracy": _ratio(float((weights * (predicted == truth)).sum()), total),
        "yes rate": _ratio(said, total),
        "precision": _ratio(hits, said),
        "recall": _ratio(hits, present),
    }


def _ratio(part: float, total: float) -> float:
    return part / total if total else 0.0
