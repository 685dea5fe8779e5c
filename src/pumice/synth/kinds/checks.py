"""Checks of single kinds, which name them: each returns what is wrong with a draft, or None."""

from __future__ import annotations

import re

from pumice.synth.kinds.base import Draft, says_no, says_yes

_HONEST = re.compile(
    r"(can(not|[’']t| not)|could(n[’']t| not)|impossible|(not|isn[’']t) possible|no way (to|of)|"
    r"unable|unclear|unknown|(not|isn[’']t) (shown|visible|clear|certain|in view)|"
    r"(doesn[’']t|does not) (show|tell|say|reveal)|hard to (tell|say)|(don[’']t|do not) know|"
    r"nothing (in|here|that)|no (sign|indication|hint))",
    re.I,
)


def balanced(draft: Draft) -> str | None:
    """Each answer says yes or no, and both occur: else the answer could be given without looking."""
    answers = [turn.answer for turn in draft.turns]
    neither = [a for a in answers if not says_yes(a) and not says_no(a)]
    if neither:
        return f"an answer begins with neither yes nor no: {neither[0][:80]!r}"
    if not any(map(says_no, answers)):
        return "no answer says no"
    if not any(map(says_yes, answers)):
        return "no answer says yes"
    return None


def consistent(draft: Draft) -> str | None:
    """A flat "No, there is no X" must not deny a thing that the annotations have."""
    for turn in draft.turns:
        asked = turn.question.lower()
        if asked.startswith(("is there a", "are there any", "can you see a", "do you see a")):
            named = draft.vocabulary.named(turn.question)[:1]
            if says_no(turn.answer) and named and named[0] in draft.known and len(asked.split()) <= 5:
                return f"{turn.question!r} is denied, but the annotations name it"
            unknown = draft.vocabulary.unsupported(turn.question, draft.known)[:1]
            if says_yes(turn.answer) and unknown == named != []:
                return f"{turn.question!r} is affirmed, but no annotation names it"
    return None


def honest(draft: Draft) -> str | None:
    """Every answer admits that the picture does not say."""
    for number, turn in enumerate(draft.turns, 1):
        if not _HONEST.search(turn.answer):
            return f"answer {number} does not say that it cannot be told: {turn.answer[:80]!r}"
    return None
