"""Checks that every generated row must pass, whatever its kind and teacher.

A check returns what is wrong, or None. The first reason found is the row's. Checks see one draft at a time;
near-duplicates are found in `duplicates`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pumice.errors import InputError, counted
from pumice.synth.context import Context
from pumice.synth.kinds.base import Draft, Kind, Unparsed, says_no
from pumice.synth.objects import Vocabulary

REASONS = (
    "no reply", "refusal", "not parsed", "number of turns", "speaks of its source", "speaks of itself",
    "length", "repetition", "unsupported objects", "kind", "language", "near-duplicate",
)  # fmt: skip

LONGEST_QUESTION = 60  # words
FEWEST_FOR_LANGUAGE = 8  # words; fewer say too little
REPEATED = 0.3  # share of three-word runs that occurred before in the same answer


@dataclass(frozen=True)
class Rejection:
    """Why a row is not used: one of REASONS, and what exactly."""

    reason: str
    detail: str


@dataclass(frozen=True)
class CheckSettings:
    """What can be set: how many unsupported things (None: as the kind says), and the language (None: any)."""

    unsupported: int | None = None
    language: str | None = "en"


# What gives away that the writer read notes instead of looking.
_SOURCE = re.compile(
    r"\b(captions?|captioned|annotations?|annotated|bounding[ -]box(es)?|coordinates?|normali[sz]ed|"
    r"(the|this|these|that|given|provided|above|image|picture) descriptions?|"
    r"(given|provided|supplied|available|above|image|picture) "
    r"(labels?|notes?|sentences?|context|metadata|information|text|details|data|input)|"
    r"(notes?|sentences?) (say|state|mention|describe|indicate|suggest)s?|"
    r"(based on|according to|as (described|mentioned|stated|noted|given|indicated) (in|by)) the "
    r"(given|provided|text|information|description|details|prompt)|"
    r"object (list|detection)|list of objects|detected objects?)\b"
    r"|\[\s*[01]?\.\d+\s*,|\b0\.\d{2,3}\s*,\s*0\.\d{2,3}\b",
    re.I,
)
_ITSELF = re.compile(
    r"\b(as an? (ai|artificial|language|text)[ -]?\w*|language model|i don[’']t have access|"
    r"i (can(not|[’']t)|am unable to|am not able to) (actually )?(see|view|look at|access|open) "
    r"(the |this |any |an? )?(image|picture|photo)\w*|"
    r"here (is|are) (the|a|your|some) (conversation|questions?|description|answers?))\b",
    re.I,
)
_REFUSAL = re.compile(
    r"^\W*((i[’']?m|i am) (very |so |really )?(sorry|unable|not able|afraid)|sorry\b|i apologi[sz]e|"
    r"i (can(not|[’']t)|won[’']t|must decline)|unfortunately,? i|as an ai)",
    re.I,
)


def is_refusal(reply: str) -> bool:
    """Whether a reply declines as a whole; a conversation in which someone is sorry is none."""
    return _REFUSAL.match(reply) is not None


def examine(
    kind: Kind, context: Context, reply: str, vocabulary: Vocabulary, settings: CheckSettings, seed: int = 0
) -> Draft | Rejection:
    """A reply as a draft that passed every check, or why it did not."""
    if is_refusal(reply):
        return Rejection("refusal", reply.strip()[:200])
    try:
        turns = kind.parse(reply, random.Random(f"{seed}/{kind.name}/{context.id}"))
    except Unparsed as error:
        return Rejection("not parsed", str(error))
    draft = Draft(kind, context, tuple(turns), vocabulary, vocabulary.known(context))
    for reason, check in CHECKS:
        if wrong := check(draft, settings):
            return Rejection(reason, wrong)
    return draft


def _turns(draft: Draft, _: CheckSettings) -> str | None:
    min_turns, max_turns = draft.kind.turns
    if min_turns <= len(draft.turns) <= max_turns:
        return None
    return f"{counted(len(draft.turns), 'turn')}, {min_turns} to {max_turns} are asked for"


def _first_match(pattern: re.Pattern[str], draft: Draft, _: CheckSettings) -> str | None:
    for turn in draft.turns:
        for text in (turn.question, turn.answer):
            if found := pattern.search(text):
                return f"{found.group()!r} in {text[:160]!r}"
    return None


def _length(draft: Draft, _: CheckSettings) -> str | None:
    min_words, max_words = draft.kind.words
    for turn in draft.turns:
        words, asked = len(turn.answer.split()), len(turn.question.split())
        if not min_words <= words <= max_words:
            length = f"an answer of {counted(words, 'word')}"
            return f"{length}, {min_words} to {max_words} are asked for: {turn.answer[:80]!r}"
        if not 1 <= asked <= LONGEST_QUESTION:
            return f"a question of {asked} words, at most {LONGEST_QUESTION} are allowed"
    return None


def _repetition(draft: Draft, _: CheckSettings) -> str | None:
    questions = Counter(_plain(turn.question) for turn in draft.turns)
    question, times = questions.most_common(1)[0]
    if times > 1:
        return f"the question {question!r} is asked {times} times"
    longer = Counter(p for t in draft.turns if len((p := _plain(t.answer)).split()) > 5)
    if longer and (most := longer.most_common(1)[0])[1] > 1:
        return f"the answer {most[0][:80]!r} is given {most[1]} times"
    for turn in draft.turns:
        words = _plain(turn.answer).split()
        if any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False)):
            return f"a word three times in a row in {turn.answer[:80]!r}"
        runs = list(zip(words, words[1:], words[2:], strict=False))
        if len(runs) >= 8 and (share := 1 - len(set(runs)) / len(runs)) > REPEATED:
            return f"{share:.0%} of the three-word runs are repeated, {REPEATED:.0%} are allowed"
    return None


def _objects(draft: Draft, settings: CheckSettings) -> str | None:
    allowed = draft.kind.unsupported if settings.unsupported is None else settings.unsupported
    things = unsupported(draft)
    if len(things) <= allowed:
        return None
    return f"{', '.join(things)}: {len(things)} not in the annotations, {allowed} allowed"


def unsupported(draft: Draft) -> list[str]:
    """Things that a draft says are in the picture and that no annotation names."""
    parts = []
    for turn in draft.turns:
        if draft.kind.presumes and not says_no(turn.answer):
            parts.append(turn.question)
        parts.append(turn.answer)
    return draft.vocabulary.unsupported("\n".join(parts), draft.known)


def _kind(draft: Draft, _: CheckSettings) -> str | None:
    return next(filter(None, (check(draft) for check in draft.kind.checks)), None)


def _language(draft: Draft, settings: CheckSettings) -> str | None:
    text = " ".join(f"{turn.question} {turn.answer}" for turn in draft.turns)
    if settings.language is None or len(text.split()) < FEWEST_FOR_LANGUAGE:
        return None
    from py3langid import classify

    detected = str(classify(text[:1000])[0])
    if detected == settings.language:
        return None
    return f"reads as {detected!r}, {settings.language!r} is asked for"


def check_language(code: str) -> None:
    """Raise InputError on a language that is not one of those told apart."""
    from py3langid import rank

    known = sorted(name for name, _ in rank(""))
    if code not in known:
        raise InputError(f"there is no language '{code}'; use any, or one of {', '.join(known)}")


# In this order: the cheap and the plain first.
CHECKS: tuple[tuple[str, Callable[[Draft, CheckSettings], str | None]], ...] = (
    ("number of turns", _turns),
    ("speaks of its source", partial(_first_match, _SOURCE)),
    ("speaks of itself", partial(_first_match, _ITSELF)),
    ("length", _length),
    ("repetition", _repetition),
    ("unsupported objects", _objects),
    ("kind", _kind),
    ("language", _language),
)


def row(row_id: str, draft: Draft) -> dict[str, object]:
    """A draft as a LLaVA row; the picture stands before the first question."""
    turns = [(turn.question, turn.answer) for turn in draft.turns]
    said = conversations(turns, draft.kind.suffix)
    return {"id": row_id, "image": draft.context.image, "conversations": said}


def conversations(
    turns: Iterable[tuple[str, Any]], suffix: str = "", *, has_picture: bool = True
) -> list[dict[str, str]]:
    """Return questions and answers as LLaVA writes them. suffix: of the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        if not number:
            question = "<image>\n" * has_picture + f"{question}{suffix}"
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": str(answer)}]
    return messages


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
