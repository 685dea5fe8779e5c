"""What somebody does, where, and in which clothes: phrases that a caption itself supplies."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from rows.base import SINGLE_PHRASE, Photo, Row, capital, casual, rng, row, with_article
from rows.grammar import Clause, may_be_same, read_clause
from rows.mentions import caption_words, mentions
from rows.words import (
    CLOTHES,
    COLOURS,
    MANY_SUBJECTS,
    ONE_SUBJECTS,
    PLACE_PREPOSITIONS,
    PLACES,
    alternatives,
)

Turn = tuple[str, str]
DOING = (
    "What {be} the {who} doing?",
    "What {be} the {who} doing?",
    "What {be} the {who} doing in this {img}?",
    "What {be} the {who} in the {img} doing?",
    "What activity {be} the {who} doing?",
    "Can you tell me what the {who} {be} doing?",
    "Describe what the {who} {be} doing.",
)
SCENE = (
    "What is happening?",
    "What is happening here?",
    "What is going on in the {img}?",
    "What action is shown?",
    "What is happening in this {img}?",
)
WHERE = (
    "Where {be} the {who}?",
    "Where {be} the {who}?",
    "Where {be} the {who} in this {img}?",
    "Where can the {who} be seen?",
    "Where was this {img} of the {who} taken?",
)
WEARING = (
    "What {be} the {who} wearing?",
    "What {be} the {who} wearing?",
    "What {be} the {who} wearing in the {img}?",
    "What clothes {be} the {who} wearing?",
    "What does the {who} have on?",
)
IMAGES = ("image", "picture", "photo", "photograph")
_ADJECTIVES = r"(?:(?!and |with |while )[a-z-]+ ){0,3}?"
_GARMENT = rf"(?:(?:a|an) )?{_ADJECTIVES}(?:{alternatives(CLOTHES)})\b"
_WEARING = re.compile(rf"\bwearing ((?:{_GARMENT})(?:,? and {_GARMENT})?)")
_DRESSED = re.compile(
    rf"\b({alternatives(list(ONE_SUBJECTS))}) (?:in|wearing|dressed in) "
    rf"((?:{_GARMENT})(?:,? and {_GARMENT})?)(?! (?:and|with|shirt|suit|hat))"
)
_PLACE = re.compile(
    rf"\b({alternatives(list(PLACE_PREPOSITIONS))}) ((?:the|a|an|some) )"
    rf"((?:[a-z-]+ ){{0,2}}?)({alternatives(PLACES)})$"
)
_VAGUE = frozenset(
    ["of", "and", "with", "by", "to", "from", "in", "on", "at", "into", "his", "her", "their", "its"]
)


def subject_of(photo: Photo) -> tuple[str, bool] | None:
    """The one subject that at least two captions agree on: (word, plural), or None."""
    clauses = [clause for clause in map(read_clause, photo.captions) if clause]
    for clause in clauses:
        agreeing = [c for c in clauses if c.head == clause.head]
        rivals = [c for c in clauses if not may_be_same(c.head, clause.head)]
        if len(agreeing) >= 2 and not rivals and is_alone(clause.head, photo):
            return clause.head, clause.plural
    return None


def is_alone(head: str, photo: Photo) -> bool:
    """Whether "the man" can mean only one: no caption speaks of several, or of another."""
    if head in MANY_SUBJECTS:
        return True
    text = " ".join(photo.captions).lower()
    several = {"man": "men", "woman": "women", "child": "children", "person": "people"}.get(head, head + "s")
    return not re.search(rf"\b({several}|another|other|others|two|three|four|five|group|couple)\b", text)


def clauses_of(photo: Photo, head: str) -> list[Clause]:
    clauses = [clause for clause in map(read_clause, photo.captions) if clause]
    return [c for c in clauses if may_be_same(c.head, head) and 1 <= len(c.action.split()) <= 11]


def doing_turn(photo: Photo, random_: random.Random) -> Turn | None:
    subject = subject_of(photo)
    if subject is None:
        return None
    who, plural = subject
    clauses = clauses_of(photo, who)
    if not clauses:
        return None
    action = random_.choice(clauses).action
    be = "are" if plural else "is"
    img = random_.choice(IMAGES)
    if random_.random() < 0.2:
        if random_.random() < 0.5:
            some = f"Some {who}" if plural else f"A {who}"
            return casual(random_.choice(SCENE).format(img=img), random_), f"{some} {be} {action}."
        return random_.choice(SCENE).format(img=img) + SINGLE_PHRASE, capital(_brief(action))
    question = random_.choice(DOING).format(be=be, who=who, img=img)
    roll = random_.random()
    if roll < 0.25 and question.endswith("?"):
        return question + SINGLE_PHRASE, capital(_brief(action))
    pronoun = "they" if plural else ONE_SUBJECTS[who]
    if roll < 0.6 and pronoun:
        return casual(question, random_), f"{capital(pronoun)} {be} {action}."
    return casual(question, random_), f"The {who} {be} {action}."


def _brief(action: str) -> str:
    """The action without its trailing place: "riding a bike down a road" -> "riding a bike"."""
    cut = re.split(
        r" (?=(?:down|in|on|at|through|across|along|near|by|with|over|towards?|into|from|past) )", action
    )
    brief = " ".join(cut[:2]) if len(cut[0].split()) == 1 and len(cut) > 1 else cut[0]
    return action if re.search(r"\b(some|their|the|a|an|his|her|its|of|and)$", brief) else brief


def place_of(photo: Photo, random_: random.Random | None = None) -> str | None:
    """Where a caption ends, if a second caption names that place: "in the tall grass"."""
    words = caption_words(photo.captions)
    places = []
    for caption in photo.captions:
        match = _PLACE.search(caption.lower().rstrip("."))
        if not match or not _VAGUE.isdisjoint(match[3].split()):
            continue
        if sum(match[4] in w for w in words) >= 2:
            places.append(f"{PLACE_PREPOSITIONS[match[1]]} {match[2]}{match[3]}{match[4]}")
    if not places:
        return None
    return random_.choice(places) if random_ else places[0]


def where_turn(photo: Photo, random_: random.Random) -> Turn | None:
    subject = subject_of(photo)
    answer = place_of(photo, random_)
    if subject is None or answer is None:
        return None
    who, plural = subject
    be = "are" if plural else "is"
    question = random_.choice(WHERE).format(be=be, who=who, img=random_.choice(IMAGES))
    if random_.random() < 0.3:
        return question + SINGLE_PHRASE, capital(answer)
    if random_.random() < 0.35:
        return casual(question, random_), f"{capital(answer)}."
    return casual(question, random_), f"The {who} {be} {answer}."


def wearing_of(photo: Photo, who: str) -> str | None:
    """What the one subject wears, with as many colours as a caption gives; None if in doubt."""
    alone = ONE_SUBJECTS.get(who) == "it" or "animal" in mentions(photo.captions).no
    answers = []
    for caption in photo.captions:
        text = caption.lower()
        direct = _DRESSED.search(text)
        if direct and may_be_same(direct[1], who):
            answers.append(direct[2])
            continue
        clause = read_clause(caption)
        garments = _WEARING.findall(text)
        # without a clause of one subject it may be the dog that wears the collar
        if (
            alone
            and len(garments) == 1
            and clause is not None
            and not clause.plural
            and may_be_same(clause.head, who)
        ):
            answers.append(garments[0])
    answers = [_with_its_article(re.sub(r"^(?:the|his|her) ", "", answer)) for answer in answers]
    return max(answers, key=lambda text: (sum(c in text for c in COLOURS), len(text)), default=None)


def _with_its_article(garments: str) -> str:
    """`brown cap` -> `a brown cap`; `sunglasses` and `a cap` stay."""
    first = garments.split(" and ", maxsplit=1)[0]
    if re.match(r"(?:a|an) ", first) or (first.endswith("s") and not first.endswith("dress")):
        return garments
    return with_article(garments)


def wearing_turn(photo: Photo, random_: random.Random) -> Turn | None:
    subject = subject_of(photo)
    if subject is None or subject[1]:
        return None
    who = subject[0]
    answer = wearing_of(photo, who)
    if answer is None:
        return None
    question = random_.choice(WEARING).format(be="is", who=who, img=random_.choice(IMAGES))
    pronoun = ONE_SUBJECTS[who]
    roll = random_.random()
    if roll < 0.25:
        return question + SINGLE_PHRASE, capital(re.sub(r"^(a|an) ", "", answer))
    if roll < 0.45:
        return casual(question, random_), f"{capital(answer)}."
    name = capital(pronoun) if pronoun and random_.random() < 0.5 else f"The {who}"
    return casual(question, random_), f"{name} is wearing {answer}."


def happening_turns(photo: Photo, seed: int) -> list[Turn]:
    """Up to three turns on one photo: doing, where, wearing."""
    random_ = rng(seed, "happening", photo.name)
    turns = (doing_turn(photo, random_), where_turn(photo, random_), wearing_turn(photo, random_))
    return [turn for turn in turns if turn is not None]


def happening_rows(photos: Sequence[Photo], seed: int) -> list[Row]:
    return [
        row(f"happening-{photo.name}-{number}", photo.image, [turn])
        for photo in photos
        for number, turn in enumerate(happening_turns(photo, seed))
    ]
