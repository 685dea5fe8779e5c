"""Questions that presuppose a thing: refused when it is absent, answered when it is there.

Both ask of the same things, about as often, so that the words of a question hardly betray the answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rows.attributes import WHICH_COLOUR, colour_turn, colours
from rows.base import Photo, Row, casual, rng, row, with_article
from rows.happening import DOING, doing_turn, subject_of
from rows.mentions import mentions
from rows.nouns import NOUNS, Noun
from rows.words import PLURAL_ONLY

WHERE = ("Where {be} the {who}?", "Where {be} the {who} in this {img}?", "What is next to the {who}?")
REFUSALS = (
    "There is no {one} in the {img}.",
    "There is no {one} in the {img}.",
    "There is no {one} in this {img}.",
    "I do not see {a} in the {img}.",
    "I can't see {a} in this {img}.",
    "The {img} does not show {a}.",
)
PLURAL_REFUSALS = (
    "There are no {many} in the {img}.",
    "I do not see any {many} in the {img}.",
    "The {img} does not show any {many}.",
)
IMAGES = ("image", "picture", "photo", "photograph")


def refuse(noun: Noun, random_: random.Random) -> str:
    singular, plural = noun.forms[0]
    img = random_.choice(IMAGES)
    if not singular:
        return random_.choice(PLURAL_REFUSALS).format(many=plural, img=img)
    forms = REFUSALS if plural else REFUSALS[:3]
    return random_.choice(forms).format(one=singular, a=with_article(singular), img=img)


def refusal_rows(photos: Sequence[Photo], seed: int) -> list[Row]:
    """Presuppositions that hold, and about as many that fail, for the same nouns where photos lack them."""
    true_turns: list[tuple[Photo, str, str, tuple[str, str]]] = []
    for photo in photos:
        random_ = rng(seed, "refusal", photo.name)
        colour_of = [(thing, colour) for thing, colour in colours(photo).items() if thing in NOUNS]
        subject = subject_of(photo)
        if colour_of and random_.random() < 0.7:
            thing, colour = random_.choice(colour_of)
            true_turns.append((photo, thing, "colour", colour_turn(thing, colour, random_)))
        elif subject is not None and subject[0] in NOUNS:
            turn = doing_turn(photo, random_)
            if turn is not None and "the " + subject[0] in turn[0].lower():
                true_turns.append((photo, subject[0], "doing", turn))
    needed = Counter((name, kind) for _, name, kind, _ in true_turns)
    rows = [row(f"refusal-{photo.name}-there", photo.image, [turn]) for photo, _, _, turn in true_turns]
    order = list(photos)
    rng(seed, "refusal", "order").shuffle(order)
    drawn: Counter[tuple[str, str]] = Counter()
    for photo in order:
        random_ = rng(seed, "refusal", "absent", photo.name)
        absent = mentions(photo.captions).no
        candidates = sorted(key for key in needed if key[0] in absent and drawn[key] < needed[key])
        others = sorted(n for n in absent if NOUNS[n].kind in ("animals", "vehicles", "sport", "objects"))
        if candidates:
            name, kind = random_.choices(candidates, [needed[key] - drawn[key] for key in candidates])[0]
            drawn[name, kind] += 1
        elif others and random_.random() < 0.05:
            name, kind = random_.choice(others), "where"
        else:
            continue
        rows.append(row(f"refusal-{photo.name}-absent", photo.image, [_absent_turn(name, kind, random_)]))
    return rows


def _absent_turn(name: str, kind: str, random_: random.Random) -> tuple[str, str]:
    noun = NOUNS[name]
    forms = {"colour": WHICH_COLOUR, "doing": DOING, "where": WHERE}[kind]
    if kind == "doing" and random_.random() < 0.3:
        forms = WHERE
    question = random_.choice(forms)
    asked = noun.forms[0][0] or noun.forms[0][1]
    be = "are" if not noun.forms[0][0] or name in PLURAL_ONLY else "is"
    img = random_.choice(IMAGES)
    return casual(question.format(be=be, who=asked, thing=asked, img=img), random_), refuse(noun, random_)
