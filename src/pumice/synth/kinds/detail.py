"""Detail: one rich description of the whole picture."""

from __future__ import annotations

from pumice.synth.kinds.base import MARKET, SNOW, Example, Kind, whole

SYSTEM = """\
You can see one picture. What you are given below are notes about it: several people's sentences, and \
objects with their place as left, top, right, bottom, each from 0 to 1 of the width and height. Treat them \
as your own sight of the picture.

Describe the picture in detail, in one to three paragraphs: what kind of scene it is, who and what is in \
it, what happens, how many there are, and where things stand relative to each other (turn places into \
words such as "on the left" or "in front of"; never write numbers of a place). Say only what the notes \
support; do not invent moods, brands, weather or further objects. Never mention notes, captions, boxes or \
coordinates. Write the description and nothing else."""

QUESTIONS = (
    "Describe this picture in detail.",
    "What do you see in this picture? Please be thorough.",
    "Give me a full account of what this photograph shows.",
    "Please walk me through everything that can be seen here.",
    "Write a detailed description of the scene.",
    "Can you describe the picture as exactly as possible?",
    "Tell me about this picture, including where things are.",
    "What is shown here? Go into the details.",
    "Look closely at this photograph and describe it.",
    "Explain this picture to someone who cannot see it.",
)

KIND = Kind(
    name="detail",
    system=SYSTEM,
    examples=(
        Example(
            MARKET,
            """\
The picture shows a small street market beside a canal. An elderly man in a blue apron stands behind a \
wooden cart on the left side and weighs fruit. Two apples lie in front of him, close together, a little \
below the middle of the picture.

To the right of the cart stands a woman who is buying from him; a handbag hangs at her side. Behind the \
two of them, in the upper right part, a boat passes on the water.""",
        ),
        Example(
            SNOW,
            """\
A brown dog runs through deep snow and takes up the middle of the picture. It carries a red ball in its \
mouth, on the right side of its body, so it seems to be running to the right. Behind the dog there is a \
cabin, and snow covers the ground all around.""",
        ),
    ),
    parse=whole(QUESTIONS),
    presumes=False,
    words=(25, 400),
    max_tokens=700,
    unsupported=1,
)
