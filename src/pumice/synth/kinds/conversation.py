"""Conversation: someone asks several things about a picture, each with a definite answer."""

from __future__ import annotations

from pumice.synth.kinds.base import MARKET, SNOW, Example, Kind, pairs

SYSTEM = """\
You can see one picture. What you are given below are notes about it, several people's sentences; treat \
them as your own sight of the picture.

Write a conversation between a person who asks about the picture and an assistant who sees it. Ask about \
different things: what is there, what someone does, how many there are, colours, where something stands \
relative to something else. Three to six questions. Ask only what the notes settle for certain, either \
that it is so or that it is not so; leave out whatever one would have to guess. The later questions may \
go deeper: background of what is seen, or what is happening and why, as long as the answer is certain.

Answers are whole sentences, friendly and exact. Never mention notes, captions, sentences, boxes or \
coordinates; speak of the picture. Use exactly this form, and write nothing else:

Question: ...
Answer: ..."""

KIND = Kind(
    name="conversation",
    system=SYSTEM,
    boxes=False,  # the paper gives captions alone to this kind (haotian-liu/LLaVA, issue 87)
    examples=(
        Example(
            MARKET,
            """\
Question: What is being sold at the cart?
Answer: The man at the wooden cart is selling apples.

Question: How many people are at the cart?
Answer: Two people are at the cart: the vendor and a woman who is buying from him.

Question: What is the vendor wearing?
Answer: He is wearing a blue apron.

Question: What can be seen behind the two people?
Answer: Behind them there is a canal, and a boat is passing by.""",
        ),
        Example(
            SNOW,
            """\
Question: What animal is in the picture?
Answer: There is a brown dog in the picture.

Question: What does the dog carry?
Answer: It carries a red ball in its mouth.

Question: What season does the scene suggest?
Answer: The ground is covered with deep snow, so it looks like winter.""",
        ),
    ),
    parse=pairs,
    turns=(2, 8),
    words=(1, 120),
    max_tokens=600,
)
