"""Questions on drawn scenes: number, colour, position, name and presence, all exact."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rows.attributes import HOW_MANY, WHICH_COLOUR
from rows.base import SINGLE_PHRASE, Row, capital, casual, plural, rng, row, with_article
from rows.composites import SHAPES, Placed, Scene, Thing
from rows.presence import SINGULAR, forced

Turn = tuple[str, str]
IMAGES = ("image", "picture")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = {"left": ("left of", "right of"), "top": ("above", "below")}
RELATIONS = {
    "left of": ("to the left of", "on the left of", "left of"),
    "right of": ("to the right of", "on the right of", "right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scene_turns(scene: Scene, things: Sequence[Thing], seed: int) -> dict[str, list[Turn]]:
    """Turns by source: counting, colour, position, presence, naming."""
    random_ = rng(seed, "scene", scene.image)
    names = [placed.thing for placed in scene.things]
    turns: dict[str, list[Turn]] = {
        "counting": [],
        "colour": [],
        "position": [],
        "presence": [],
        "naming": [],
    }
    if scene.arrangement == "count":
        turns["counting"] = [
            _how_many(name, number, random_)
            for name, number in _numbers(names).items()
            if scene.plain or name in SHAPES  # the photograph may show more of a real thing
        ]
        if scene.plain and random_.random() < 0.3:
            turns["counting"].append(_how_many("object", len(names), random_))
    elif scene.arrangement == "single":
        turns["naming"] = [_name(names[0], random_)]
    else:
        turns["position"] = _positions(scene, random_)
    unique = [thing for thing in names if thing.colour and _numbers(names)[thing.name] == 1]
    if unique:
        turns["colour"] = [_colour(thing, random_) for thing in random_.sample(unique, min(2, len(unique)))]
    shown_thing = random_.choice(names)
    absent = [
        t
        for t in things
        if (scene.plain or t.name in SHAPES)
        and not any(set(t.name.split()) & set(n.name.split()) for n in names)
    ]
    turns["presence"] = [_presence(shown_thing.name, True, random_)]
    if absent:
        turns["presence"].append(_presence(random_.choice(absent).name, False, random_))
    return turns


def scene_rows(scenes: Sequence[Scene], things: Sequence[Thing], seed: int) -> dict[str, list[Row]]:
    """Rows by source; presence and naming questions go to the source `composites`."""
    rows: dict[str, list[Row]] = {"counting": [], "colour": [], "position": [], "composites": []}
    for scene in scenes:
        for source, turns in scene_turns(scene, things, seed).items():
            file = source if source in rows else "composites"
            stem = scene.image.removeprefix("composites/").removesuffix(".jpg")
            rows[file] += [row(f"{source}-{stem}-{n}", scene.image, [turn]) for n, turn in enumerate(turns)]
    return rows


def _numbers(things: Sequence[Thing]) -> Counter[str]:
    return Counter(thing.name for thing in things)


def _plural(name: str) -> str:
    irregular = {
        "mouse": "mice",
        "fish": "fish",
        "sheep": "sheep",
        "goose": "geese",
        "glass of water": "glasses of water",
    }
    if name.endswith("fish"):
        return name
    return irregular.get(name, plural(name))


def _how_many(name: str, number: int, random_: random.Random) -> Turn:
    question = random_.choice(HOW_MANY).format(many=_plural(name), img=random_.choice(IMAGES))
    roll = random_.random()
    if roll < 0.4 and question.endswith("?"):
        return question + SINGLE_PHRASE, str(number)
    if roll < 0.5:
        return casual(question, random_), f"{capital(NUMBER_WORDS[number])}."
    noun = name if number == 1 else _plural(name)
    return casual(question, random_), f"There {'is' if number == 1 else 'are'} {NUMBER_WORDS[number]} {noun}."


def _name(thing: Thing, random_: random.Random) -> Turn:
    question = random_.choice(
        (
            "What is this?",
            "What is in the picture?",
            "What object is shown in the image?",
            "Name the object in the image.",
            "What do you see?",
        )
    )
    if random_.random() < 0.4:
        return question + SINGLE_PHRASE, capital(thing.name)
    return casual(question, random_), capital(with_article(thing.label)) + "."


def _colour(thing: Thing, random_: random.Random) -> Turn:
    question = random_.choice(WHICH_COLOUR).format(be="is", thing=thing.name, img=random_.choice(IMAGES))
    if random_.random() < 0.45:
        return question + SINGLE_PHRASE, capital(thing.colour)
    return casual(question, random_), f"The {thing.name} is {thing.colour}."


def _presence(name: str, is_there: bool, random_: random.Random) -> Turn:
    img = random_.choice(IMAGES)
    question = random_.choice(SINGULAR).format(a=with_article(name), n=name, img=img)
    if random_.random() < 0.5:
        return forced(question, random_), "Yes" if is_there else "No"
    if is_there:
        return casual(question, random_), f"Yes, there is {with_article(name)}."
    return casual(question, random_), f"No, there is no {name} in the {img}."


def _positions(scene: Scene, random_: random.Random) -> list[Turn]:
    first, *_, last = scene.things
    low, high = SIDES["left" if scene.arrangement == "row" else "top"]
    turns = [
        _relation(first, last, low, random_),
        _is_it(first, last, low, random_),
        _which(first, last, low, high, random_),
    ]
    if len(scene.things) == 3:
        turns.append(_between(scene.things, random_))
    return turns


def _relation(first: Placed, last: Placed, low: str, random_: random.Random) -> Turn:
    """Where is the A with respect to the B?"""
    if random_.random() < 0.5:
        first, last, low = last, first, OPPOSITE[low]
    a, b = first.thing.name, last.thing.name
    if random_.random() < 0.5 and low in ("left of", "right of"):
        side = low.removesuffix(" of")
        question = f"Is the {a} on the left or on the right of the {b}?"
        if random_.random() < 0.5:
            return question + SINGLE_PHRASE, capital(side)
        return casual(question, random_), f"The {a} is on the {side} of the {b}."
    question = random_.choice(
        (
            f"Where is the {a} relative to the {b}?",
            f"Where is the {a}?",
            f"What is the position of the {a} relative to the {b}?",
        )
    )
    words = {"left of": "to the left of", "right of": "to the right of"}.get(low, low)
    return casual(question, random_), f"The {a} is {words} the {b}."


def _is_it(first: Placed, last: Placed, low: str, random_: random.Random) -> Turn:
    if random_.random() < 0.5:
        first, last, low = last, first, OPPOSITE[low]
    a, b = first.thing.name, last.thing.name
    truth = random_.random() < 0.5
    asked = low if truth else OPPOSITE[low]
    question = f"Is the {a} {random_.choice(RELATIONS[asked])} the {b}?"
    if random_.random() < 0.5:
        return forced(question, random_), "Yes" if truth else "No"
    words = {"left of": "to the left of", "right of": "to the right of"}.get(low, low)
    return casual(question, random_), f"{'Yes' if truth else 'No'}, the {a} is {words} the {b}."


def _which(first: Placed, last: Placed, low: str, high: str, random_: random.Random) -> Turn:
    """What is on the left?"""
    thing, relation = random_.choice(((first.thing, low), (last.thing, high)))
    location = {
        "left of": "on the left",
        "right of": "on the right",
        "above": "at the top",
        "below": "at the bottom",
    }
    side = location[relation]
    question = random_.choice(
        (
            f"What is {side}?",
            f"What is {side} of the image?",
            f"Which object is {side}?",
            f"What do you see {side} of the picture?",
        )
    )
    if random_.random() < 0.4:
        return question + SINGLE_PHRASE, capital(thing.name)
    return casual(question, random_), random_.choice(
        (f"{capital(with_article(thing.label))}.", f"The {thing.label} is {side}.")
    )


def _between(things: Sequence[Placed], random_: random.Random) -> Turn:
    first, middle, last = (placed.thing for placed in things)
    a, b = random_.sample((first.name, last.name), 2)
    question = random_.choice(
        (
            f"What is between the {a} and the {b}?",
            "What is in the middle?",
            f"Which object is between the {a} and the {b}?",
        )
    )
    if random_.random() < 0.4:
        return question + SINGLE_PHRASE, capital(middle.name)
    return casual(question, random_), f"{capital(with_article(middle.label))}."
