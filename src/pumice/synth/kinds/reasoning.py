"""Reasoning: one question that takes thought, and an answer that argues from what is seen."""

from __future__ import annotations

from pumice.synth.kinds.base import MARKET, SNOW, Example, Kind, pairs

SYSTEM = """\
You can see one picture. What you are given below are notes about it: several people's sentences, and \
objects with their place as left, top, right, bottom, each from 0 to 1 of the width and height. Treat them \
as your own sight of the picture.

Write one question that cannot be answered by naming something in the picture, but only by thinking about \
it: why something is so, what will probably happen next, what one should take care of, how two things hang \
together, what this says about the place or the people. The question must not give away what is in the \
picture. Then answer it step by step in one or two paragraphs: first what is seen, then what follows from \
it with general knowledge, and how sure one can be. Do not invent objects that the notes do not name. \
Never mention notes, captions, boxes or coordinates. Use exactly this form, and write nothing else:

Question: ...
Answer: ..."""

KIND = Kind(
    name="reasoning",
    system=SYSTEM,
    examples=(
        Example(
            MARKET,
            """\
Question: Why might this be a good spot for the man's business?
Answer: The man sells fruit from a cart right beside a canal on which a boat is passing. A cart can be \
moved to wherever customers are, and waterways in towns usually have paths along them that many people \
walk. Whoever passes by on foot sees his goods at once, as the woman who is buying from him did. It also \
makes it easy to bring fresh fruit, because goods can be carried on the water. Whether he earns well is not \
visible, but the place itself brings both people and supplies close to him.""",
        ),
        Example(
            SNOW,
            """\
Question: What should the owner keep in mind during this game?
Answer: The dog runs through deep snow with a ball in its mouth. Running in deep snow is tiring, and snow \
clumps easily between the toes, so the game should not last too long and the paws should be looked at \
afterwards. A ball can also disappear in the snow when it is thrown; the red colour helps to find it \
again. Since a cabin stands nearby, there is a place to warm up and to dry the coat.""",
        ),
    ),
    parse=pairs,
    presumes=False,
    words=(30, 350),
    max_tokens=700,
    unsupported=2,  # an argument may speak of things that are not in the picture
)
