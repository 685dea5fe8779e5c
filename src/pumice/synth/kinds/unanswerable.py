"""Unanswerable: reasonable questions that this picture cannot settle, and an honest answer that says why."""

from __future__ import annotations

import re

from pumice.synth.kinds.base import MARKET, SNOW, Draft, Example, Kind, pairs

SYSTEM = """\
You can see one picture. What you are given below are notes about it: several people's sentences, and \
objects with their place as left, top, right, bottom, each from 0 to 1 of the width and height. Treat them \
as your own sight of the picture.

Write two or three questions that fit this picture but that nobody could answer by looking at it: names, \
prices, what happened before, what someone thinks, what lies outside the frame, details too small or \
hidden. The answer says plainly that this cannot be told from the picture, in varied words, gives the \
reason in a few words, and, where it helps, adds what can be seen instead. Do not guess. Never mention \
notes, captions, boxes or coordinates. Use exactly this form, and write nothing else:

Question: ...
Answer: ..."""

_HONEST = re.compile(
    r"(can(not|[’']t| not)|could(n[’']t| not)|impossible|(not|isn[’']t) possible|no way (to|of)|"
    r"unable|unclear|unknown|(not|isn[’']t) (shown|visible|clear|certain|in view)|"
    r"(doesn[’']t|does not) (show|tell|say|reveal)|hard to (tell|say)|(don[’']t|do not) know|"
    r"nothing (in|here|that)|no (sign|indication|hint))",
    re.I,
)


def honest(draft: Draft) -> str | None:
    """Every answer admits that the picture does not say."""
    for number, turn in enumerate(draft.turns, 1):
        if not _HONEST.search(turn.answer):
            return f"answer {number} does not say that it cannot be told: {turn.answer[:80]!r}"
    return None


KIND = Kind(
    name="unanswerable",
    system=SYSTEM,
    examples=(
        Example(
            MARKET,
            """\
Question: How much does a pound of the fruit cost?
Answer: That can't be told from the picture: no price is visible on the cart. One can only see that apples \
are being weighed.

Question: What is the name of this town?
Answer: The picture does not show it; there is a canal, but nothing that names the place.""",
        ),
        Example(
            SNOW,
            """\
Question: How old is the dog?
Answer: It is impossible to say from the picture alone how old the dog is.

Question: Who threw the ball?
Answer: I can't tell, because nobody but the dog is in view.""",
        ),
    ),
    parse=pairs,
    presumes=False,
    turns=(1, 4),
    words=(4, 80),
    max_tokens=300,
    unsupported=1,
    alike=True,
    checks=(honest,),
)
