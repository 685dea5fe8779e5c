"""Hard negatives: questions about likely but absent things, mixed with true ones (after arXiv 2306.14565)."""

from __future__ import annotations

from pumice.synth.kinds.base import MARKET, SNOW, Draft, Example, Kind, pairs, says_no, says_yes

SYSTEM = """\
You can see one picture. What you are given below are notes about it: several people's sentences, and \
objects with their place as left, top, right, bottom, each from 0 to 1 of the width and height. Treat them \
as your own sight of the picture.

Write four to six questions that test whether someone really looks. At least half of them ask about \
something that one would expect in such a scene but that is not there, or that give a thing a wrong \
colour, number, place or action; their answers begin with "No" and put it right in a few words. The others \
ask about something that is there, and their answers begin with "Yes". Mix the order. Be sure that what \
you deny cannot be in the picture. Never mention notes, captions, boxes or coordinates. Use exactly this \
form, and write nothing else:

Question: ...
Answer: ..."""


def balanced(draft: Draft) -> str | None:
    """Each answer says yes or no, and both occur: else the answer could be given without looking."""
    answers = [turn.answer for turn in draft.turns]
    neither = [a for a in answers if not says_yes(a) and not says_no(a)]
    if neither:
        return f"an answer begins with neither yes nor no: {neither[0][:80]!r}"
    if not any(map(says_no, answers)):
        return f"none of the {len(answers)} answers says no"
    if not any(map(says_yes, answers)):
        return f"none of the {len(answers)} answers says yes"
    return None


def consistent(draft: Draft) -> str | None:
    """A flat "No, there is no X" must not deny a thing that the annotations have."""
    for turn in draft.turns:
        asked = turn.question.lower()
        if asked.startswith(("is there a", "are there any", "can you see a", "do you see a")):
            named = draft.vocabulary.named(turn.question)[:1]
            if says_no(turn.answer) and named and named[0] in draft.known and len(asked.split()) <= 5:
                return f"{turn.question!r} is denied, but the annotations name it"
            if (
                says_yes(turn.answer)
                and draft.vocabulary.unsupported(turn.question, draft.known)[:1] == named != []
            ):
                return f"{turn.question!r} is affirmed, but no annotation names it"
    return None


KIND = Kind(
    name="hard-negatives",
    system=SYSTEM,
    examples=(
        Example(
            MARKET,
            """\
Question: Is the vendor wearing a red apron?
Answer: No, his apron is blue.

Question: Is there a boat in the picture?
Answer: Yes, a boat is passing behind the two people.

Question: Is the woman riding a bicycle?
Answer: No, she is standing at the cart and no bicycle is to be seen.

Question: Does the cart carry apples?
Answer: Yes, apples lie on it.""",
        ),
        Example(
            SNOW,
            """\
Question: Is a person walking beside the dog?
Answer: No, the dog is alone in the snow.

Question: Is the dog running?
Answer: Yes, it is running through deep snow.

Question: Does the dog carry a stick?
Answer: No, it has a red ball in its mouth.""",
        ),
    ),
    parse=pairs,
    presumes=False,
    turns=(2, 8),
    words=(1, 40),
    max_tokens=400,
    unsupported=0,
    alike=True,
    checks=(balanced, consistent),
)
