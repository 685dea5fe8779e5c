"""Score yes/no answers about what is in an image, as POPE does (arXiv 2305.10355)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pumice.errors import InputError

_NO = frozenset(["No", "not", "no"])  # POPE's list, without "NO": POPE reads that as yes
_EITHER = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


def means_yes(answer: str) -> bool:
    """Return False if a word of the first sentence is No, not or no; commas are removed first.

    Every other answer means yes, also an empty one. Words end at spaces only, as in POPE's evaluate.py.
    """
    sentence = answer.split(".", 1)[0].replace(",", "")
    return _NO.isdisjoint(sentence.split(" "))


@dataclass(frozen=True)
class PresenceScore:
    """Scores as fractions of 1; "yes" is the positive class. A ratio without cases is 0."""

    questions: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_rate: float  # share of answers that mean yes
    unclear: float  # share of answers with neither yes, no nor not; POPE counts them as yes


def presence_score(answers: Sequence[str], truths: Sequence[bool]) -> PresenceScore:
    """Score unchanged answers; truths[i] is whether the object is in the image.

    Raises InputError without answers, or where the number of truths differs.
    """
    if len(answers) != len(truths) or not answers:
        raise InputError(f"{len(answers)} answers for {len(truths)} questions; give one for each")
    predicted = [means_yes(answer) for answer in answers]
    hits = sum(yes and truth for yes, truth in zip(predicted, truths, strict=True))
    right = sum(yes == truth for yes, truth in zip(predicted, truths, strict=True))
    precision, recall = _ratio(hits, sum(predicted)), _ratio(hits, sum(truths))
    return PresenceScore(
        questions=len(answers),
        accuracy=right / len(answers),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_rate=sum(predicted) / len(answers),
        unclear=sum(_EITHER.search(answer) is None for answer in answers) / len(answers),
    )


def _ratio(part: float, total: float) -> float:
    return part / total if total else 0.0
