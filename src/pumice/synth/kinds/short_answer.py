"""Short answer: questions with one word or phrase, behind LLaVA-1.5's format prompt."""

from __future__ import annotations

from pumice.synth.kinds.base import MARKET, SNOW, Example, Kind, pairs

SYSTEM = """\
You can see one picture. What you are given below are notes about it: several people's sentences, and \
objects with their place as left, top, right, bottom, each from 0 to 1 of the width and height. Treat them \
as your own sight of the picture.

Write three to eight questions about it whose answer is a single word or a short phrase of at most four \
words: yes or no, a number, a colour, an object, a place, an action. Mix these. Ask only what the notes \
settle for certain. Never mention notes, captions, boxes or coordinates. Use exactly this form, and write \
nothing else:

Question: ...
Answer: ..."""

KIND = Kind(
    name="short-answer",
    system=SYSTEM,
    examples=(
        Example(
            MARKET,
            """\
Question: What fruit does the man sell?
Answer: Apples

Question: What colour is his apron?
Answer: Blue

Question: How many people are at the cart?
Answer: 2

Question: Is the boat behind the people?
Answer: Yes""",
        ),
        Example(
            SNOW,
            """\
Question: What does the dog have in its mouth?
Answer: Ball

Question: Is the dog indoors?
Answer: No

Question: What covers the ground?
Answer: Snow""",
        ),
    ),
    parse=pairs,
    turns=(2, 10),
    words=(1, 5),
    max_tokens=300,
    unsupported=0,
    alike=True,
    suffix="\nAnswer the question using a single word or phrase.",
)
