"""How many and which colour, where at least two captions agree and none objects."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

from rows.base import SINGLE_PHRASE, Photo, Row, capital, casual, rng, row
from rows.mentions import plain_words
from rows.words import COLOURED, COLOURS, COUNTED, NUMBERS, PLURAL_ONLY, alternatives

Turn = tuple[str, str]
IMAGES = ("image", "picture", "photo", "photograph")
HOW_MANY = (
    "How many {many} are there?",
    "How many {many} are there in the {img}?",
    "How many {many} are in this {img}?",
    "How many {many} can you see?",
    "How many {many} do you see in the {img}?",
    "What is the number of {many} in the {img}?",
    "Count the {many} in the {img}.",
)
WHICH_COLOUR = (
    "What color {be} the {thing}?",
    "What color {be} the {thing}?",
    "What color {be} the {thing} in the {img}?",
    "What colour {be} the {thing}?",
    "Which color {be} the {thing}?",
    "What is the color of the {thing}?",
    "What is the color of the {thing} in this {img}?",
)
_SEVERAL = "another|other|others|two|three|four|group|people|couple|team|crowd|children"
NUMBER_WORDS = {number: word for word, number in NUMBERS.items()}
_NUMBER = re.compile(
    rf"\b({alternatives(list(NUMBERS))}|a|an|the|several|some|many) "
    rf"((?:(?!and |of |in |with )[a-z-]+ ){{0,2}}?)({alternatives(list(COUNTED))})\b"
)
_COLOUR = re.compile(
    rf"\b((?:{alternatives(COLOURS)})(?:,? (?:and|&) (?:{alternatives(COLOURS)}))?),? "
    rf"((?:(?!and |in |with |on |of |or )[a-z]+ )?)({alternatives(COLOURED)})\b"
)
_OTHER_COLOUR = re.compile(
    r"\b(multi-?colou?red|colou?rful|spotted|striped|checkered|plaid|patterned|two-toned)\b"
)


def counts(photo: Photo) -> dict[str, int]:
    """Singular noun -> its number: named by two captions, contradicted by none."""
    votes: dict[str, Counter[int]] = {}
    for caption in photo.captions:
        text = caption.lower()
        for word, _, noun in _NUMBER.findall(text):
            singular = COUNTED[noun][0]
            votes.setdefault(singular, Counter())[NUMBERS.get(word, 0)] += 1
    counts_by_name = {}
    for singular, numbers in votes.items():
        numbers.pop(0, None)
        if len(numbers) == 1 and (number := next(iter(numbers))) > 1 and numbers[number] >= 2:
            others = " ".join(photo.captions).lower()
            if not re.search(
                rf"\b(another|other) (\w+ )?({singular}|{dict(COUNTED.values())[singular]})\b", others
            ):
                counts_by_name[singular] = number
    for singular in ("dog", "man", "woman", "boy", "girl"):  # one: everybody speaks of one
        forms = [plural for plural, (one, _) in COUNTED.items() if one == singular]
        texts = [f" {plain_words(caption)} " for caption in photo.captions]
        single = sum(bool(re.search(rf"\b(a|an|the|one) (\w+ ){{0,3}}{singular} ", text)) for text in texts)
        several = rf"\b({'|'.join(forms)}|{_SEVERAL})\b"
        twice = rf"\b{singular}\b.*\b{singular}\b"
        if (
            len(texts) >= 4
            and single >= 4
            and not any(re.search(several, t) or re.search(twice, t) for t in texts)
        ):
            counts_by_name[singular] = 1
    return counts_by_name


def counting_turn(singular: str, number: int, random_: random.Random) -> Turn:
    """A counting question; the single-word form is answered by a digit, as VQA does."""
    plural = dict(COUNTED.values()).get(singular, singular + "s")
    question = random_.choice(HOW_MANY).format(many=plural, img=random_.choice(IMAGES))
    word, be, name = NUMBER_WORDS[number], "is" if number == 1 else "are", singular if number == 1 else plural
    roll = random_.random()
    if roll < 0.35 and question.endswith("?"):
        return question + SINGLE_PHRASE, str(number)
    if roll < 0.5:
        return casual(question, random_), f"{capital(word)}."
    return casual(question, random_), f"There {be} {word} {name}."


def colours(photo: Photo) -> dict[str, str]:
    """Thing -> its colour(s): named by two captions; no caption gives it another."""
    votes: dict[str, Counter[str]] = {}
    for caption in photo.captions:
        values: dict[str, set[str]] = {}
        for colour, _, thing in _COLOUR.findall(caption.lower()):
            single = sorted(set(re.findall(alternatives(COLOURS), colour)))
            values.setdefault(thing, set()).add(" and ".join(single).replace("grey", "gray"))
        for thing, answers in values.items():
            for names in answers:
                votes.setdefault(thing, Counter())[names] += 1
    text = " ".join(photo.captions).lower()
    agreed = {}
    for thing, counter in votes.items():
        (names, number), *others = counter.most_common()
        several = (
            re.search(rf"\b({thing}s|two|three|four|five|another|other|both)\b", text)
            if thing != "hair"
            else None
        )
        if number >= 2 and not others and not several and not _OTHER_COLOUR.search(text):
            agreed[thing] = names
    return agreed


def colour_turn(thing: str, colour: str, random_: random.Random) -> Turn:
    be = "are" if thing in PLURAL_ONLY else "is"
    question = random_.choice(WHICH_COLOUR).format(be=be, thing=thing, img=random_.choice(IMAGES))
    roll = random_.random()
    if roll < 0.35:
        return question + SINGLE_PHRASE, capital(colour)
    if roll < 0.5:
        return casual(question, random_), f"{capital(colour)}."
    return casual(question, random_), f"The {thing} {be} {colour}."


def counting_turns(photo: Photo, seed: int) -> list[Turn]:
    random_ = rng(seed, "counting", photo.name)
    return [counting_turn(name, number, random_) for name, number in counts(photo).items()]


def colour_turns(photo: Photo, seed: int) -> list[Turn]:
    random_ = rng(seed, "colour", photo.name)
    return [colour_turn(thing, colour, random_) for thing, colour in colours(photo).items()]


def counting_rows(photos: Sequence[Photo], seed: int) -> list[Row]:
    """Questions on the photos; "one" is kept for a third of its photos, or it would always win."""
    rows = []
    for photo in photos:
        keep_one = rng(seed, "one", photo.name).random() < 1 / 3
        if not keep_one and set(counts(photo).values()) == {1}:
            continue
        for number, turn in enumerate(counting_turns(photo, seed)):
            rows.append(row(f"counting-{photo.name}-{number}", photo.image, [turn]))
    return rows


def colour_rows(photos: Sequence[Photo], seed: int) -> list[Row]:
    return [
        row(f"colour-{photo.name}-{number}", photo.image, [turn])
        for photo in photos
        for number, turn in enumerate(colour_turns(photo, seed))
    ]
