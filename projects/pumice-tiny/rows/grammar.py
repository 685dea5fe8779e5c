"""Reads one caption: who is there and what they do. Anything doubtful reads as None."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rows.words import (
    FUNCTION_WORDS,
    MANY_SUBJECTS,
    NOT_ACTIONS,
    ONE_SUBJECTS,
    PROGRESSIVE,
    SAME_SUBJECT,
    alternatives,
)

_HEADS = alternatives([*ONE_SUBJECTS, *MANY_SUBJECTS])
_ADJECTIVE = rf"(?!(?:{alternatives(FUNCTION_WORDS)})\b)(?!(?:{_HEADS})\s)[a-z-]+,?"
_SEVERAL = ("two", "three", "four", "five", "six", "several", "some")
_COLOUR_PAIR = rf"(?:{_ADJECTIVE} and {_ADJECTIVE} )?"
_SUBJECT = re.compile(
    rf"^(?P<det>a|an|the|one|two|three|four|five|six|several|some)?\s*"
    rf"(?P<adjectives>{_COLOUR_PAIR}(?:{_ADJECTIVE} ){{0,3}})(?P<head>{_HEADS})\b(?P<rest>.*)$"
)
_CLOTHED = re.compile(r"^ (?:in|with|wearing|dressed in) (?:[a-z'-]+ ){1,8}?(?=is |are )")
_CUT = re.compile(
    r",| while | whilst | as | and is | and are | who | which | that | but | because | where | so "
)


@dataclass(frozen=True)
class Clause:
    """A subject and its action: "riding a bike". plural: several subjects."""

    head: str
    adjectives: str
    plural: bool
    action: str

    @property
    def be(self) -> str:
        return "are" if self.plural else "is"


def read_clause(caption: str) -> Clause | None:
    """`A man in a hat is riding a bike down a road, smiling.` -> man: riding a bike down a road."""
    text = caption.lower().strip().rstrip(".")
    match = _SUBJECT.match(text)
    if not match:
        return None
    head, predicate = match["head"], match["rest"]
    plural = head in MANY_SUBJECTS
    if match["det"] in (("a", "an", "one") if plural else _SEVERAL):
        return None
    if re.match(r"^ (?:and|,|or|'s|with (?:his|her|a) (?:dog|child))", predicate):
        return None
    adjectives = match["adjectives"].strip()
    if any(word.endswith("ing") or word in PROGRESSIVE for word in adjectives.split()):
        return None
    clothed = _CLOTHED.match(predicate)
    if clothed:
        predicate = " " + predicate[clothed.end() :]
    words = predicate.split()
    if words[:1] and words[0] in ("is", "are"):
        words = words[1:]
        if words[:1] and words[0] not in PROGRESSIVE and words[0].endswith("ing"):
            verb = words[0]
        else:
            return None
    elif words[:1] and words[0].endswith("ing"):
        verb = words[0]
    elif words[:1] and words[0] in PROGRESSIVE and not plural:
        verb = PROGRESSIVE[words[0]]
    else:
        return None
    verb = "lying" if verb == "laying" else verb
    if verb in NOT_ACTIONS or words[1:2] == ["is"] or words[1:2] == ["are"]:
        return None
    padded = " " + " ".join(words[1:]) + " "
    tail = _CUT.split(padded)[0].strip()
    if _splits_noun(tail, padded.strip()):
        return None
    tail = _drop_second_verb(tail)
    if any(word in PROGRESSIVE for word in tail.split()):
        return None
    if re.search(r"\b(is|are|was|were|has|have)\b", tail) or re.search(
        r"\b(a|an|the|of|to|with|and|in|on|at)$", tail
    ):
        return None
    return Clause(head, adjectives, plural, f"{verb} {tail}".strip())


def _drop_second_verb(tail: str) -> str:
    """`a bike and waves` -> `a bike`: a finite second verb does not fit after "is riding"."""
    pieces = tail.split(" and ")
    for number, piece in enumerate(pieces[1:], start=1):
        if piece.split()[:1] and piece.split()[0] in PROGRESSIVE:
            return " and ".join(pieces[:number])
    return tail


def _splits_noun(tail: str, padded: str) -> bool:
    """Whether the cut fell between adjectives: "through an icy" of "through an icy, rocky field"."""
    after = padded.removeprefix(tail)
    if not after.startswith(",") or not re.search(r"\b(a|an|the|some) [a-z-]+$", tail):
        return False
    following = after.strip(", ").split()[:1]
    return bool(following) and not (following[0].endswith("ing") or following[0] in FUNCTION_WORDS)


def may_be_same(first: str, second: str) -> bool:
    """Whether two subject words can name one and the same subject."""
    return first == second or any(first in group and second in group for group in SAME_SUBJECT)
