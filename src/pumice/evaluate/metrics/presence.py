"""Yes/no questions about what is in a picture, read and counted as POPE does (arXiv 2305.10355).

Knows: texts and truths. Does not know: pictures, models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pumice.errors import InputError

_NO = frozenset(["No", "not", "no"])  # POPE's list: "NO" is a yes
_EITHER = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


def means_yes(answer: str) -> bool:
    """POPE's rule: the first sentence, without commas, says no if one of its words is No, not or no.

    Anything else is a yes, an empty answer too. Words end at spaces only, as in POPE's evaluate.py.
    """
    sentence = answer.split(".", 1)[0].replace(",", "")
    return _NO.isdisjoint(sentence.split(" "))


@dataclass(frozen=True)
class PresenceScore:
    """Shares of 1; "yes" is the positive class. A ratio without any cases is 0."""

    questions: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_rate: float  # of the answers
    unclear: float  # answers with neither yes, no nor not, which POPE counts as yes


def presence_score(answers: Sequence[str], truths: Sequence[bool]) -> PresenceScore:
    """Score answers as the model gave them; truths[i] says whether the thing is there.

    Raises InputError when there are none, or another number of truths.
    """
    if len(answers) != len(truths) or not answers:
        raise InputError(f"{len(answers)} answers for {len(truths)} questions; give one for each")
    said = [means_yes(answer) for answer in answers]
    hits = sum(yes and truth for yes, truth in zip(said, truths, strict=True))
    right = sum(yes == truth for yes, truth in zip(said, truths, strict=True))
    precision, recall = _ratio(hits, sum(said)), _ratio(hits, sum(truths))
    return PresenceScore(
        questions=len(answers),
        accuracy=right / len(answers),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_rate=sum(said) / len(answers),
        unclear=sum(_EITHER.search(answer) is None for answer in answers) / len(answers),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
