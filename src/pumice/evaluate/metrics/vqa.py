"""Score short answers against ten people's answers, as the scorers of VQA, VizWiz and TextVQA do.

Sources: GT-Vision-Lab/VQA vqaEval.py, the VizWiz API's vqaEval.py, and the EvalAI answer processor of M4C,
which LLaVA uses for TextVQA and for its submissions. Two of their errors stay, because published numbers
contain them; `corrected` repairs both. The pattern that should keep a period after a digit has `(?!<=` where
`(?<!` is meant, so it never keeps one. `re.UNICODE` is passed as the count, so only 32 periods are removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

_MAX_PERIODS = 32  # the value of re.UNICODE, which the official scorers pass as the count
_PERIOD = re.compile(r"\.(?!\d)")  # the effect of the official pattern
_PERIOD_MEANT = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA = re.compile(r"\d,\d")  # matches in the same texts as the two official patterns
_COMMAS = re.compile(r"(?<=\d),+(?=\d)")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}

# Contractions that the scorers restore: stems that end in n't, then "key=value" for all others. The errors of
# the official list (somebody'd) stay.
_NT = (
    "aren couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won "
    "wouldn ain can"
)
_OTHERS = (Path(__file__).parent / "contractions.txt").read_text(encoding="utf-8")
CONTRACTIONS = {f"{stem}t": f"{stem}'t" for stem in _NT.split()} | dict(
    entry.split("=") for entry in _OTHERS.split()
)


@lru_cache(maxsize=1 << 16)
def strip_punctuation(text: str, *, corrected: bool = False) -> str:
    """Replace punctuation by a space, or remove it next to a space or if the text has a number like 1,000."""
    thousands = (_COMMAS if corrected else _COMMA).search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        next_to_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if next_to_space or thousands else " ")
    return _PERIOD_MEANT.sub("", out) if corrected else _PERIOD.sub("", out, count=_MAX_PERIODS)


@lru_cache(maxsize=1 << 16)
def digits_and_articles(text: str) -> str:
    """Lower the case, write number words as digits, drop articles and restore apostrophes."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_m4c(text: str, *, corrected: bool = False) -> str:
    """Normalise an answer as M4C's EvalAI answer processor does; LLaVA uses it for VQAv2, VizWiz, TextVQA."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return digits_and_articles(strip_punctuation(text, corrected=corrected))


def lower_without_period(text: str) -> str:
    """Lower the case and remove the final full stop and outer spaces."""
    return text.strip().rstrip(".").strip().lower()


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(answer: str, truths: Sequence[str]) -> float:
    """Return the mean over people of min(1, other people with this answer / 3); 0 without people."""
    if not truths:
        return 0.0
    same = sum(truth == answer for truth in truths)
    scores = [min(1.0, (same - (truth == answer)) / 3) for truth in truths]
    return sum(scores) / len(scores)


def textvqa_accuracy(answer: str, truths: Sequence[str], *, corrected: bool = False) -> float:
    """Score as LLaVA's m4c_evaluator: normalise answer and truths, then leave one person out."""
    processed = [normalize_m4c(truth, corrected=corrected) for truth in truths]
    return leave_one_out(normalize_m4c(answer, corrected=corrected), processed)


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Score as VQAEval, which normalises both sides unless all people wrote the same."""
    truths, answer = [_plain(truth) for truth in truths], _plain(answer)
    if len(set(truths)) > 1:
        truths = [digits_and_articles(strip_punctuation(truth)) for truth in truths]
        answer = digits_and_articles(strip_punctuation(answer))
    return leave_one_out(answer, truths)


def vqa_accuracy_first(answer: str, truths: Sequence[str]) -> float:
    """Score as the first release of VQAEval: normalise the answer, remove punctuation from the truths."""
    if len(set(truths)) > 1:
        truths = [strip_punctuation(truth) for truth in truths]
    return leave_one_out(digits_and_articles(strip_punctuation(_plain(answer))), truths)


def vizwiz_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Score as the VizWiz API: normalise the answer, leave the truths unchanged."""
    return leave_one_out(digits_and_articles(strip_punctuation(_plain(answer))), truths)
