"""A kind of rows of my own."""

from pumice.generate.kinds.base import MARKET, Draft, Example, Kind, pairs


def rests(draft: Draft) -> str | None:
    return None if "rests" in draft.turns[0].answer else "nothing rests"


KIND = Kind(
    name="mine",
    system="Write a question about the picture and its answer.",
    examples=(Example(MARKET, "Question: What is sold?\nAnswer: Apples, at rest."),),
    parse=pairs,
    turns=(1, 2),
    words=(1, 20),
    max_tokens=64,
    alike=True,
    unsupported=5,
    checks=(rests,),
)
