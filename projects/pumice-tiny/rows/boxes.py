"""What boxes around every thing answer exactly: how many, and on which side."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rows.attributes import HOW_MANY, NUMBER_WORDS
from rows.base import SINGLE_PHRASE, Row, capital, casual, rng, row
from rows.coco import CATEGORIES, Scene
from rows.presence import IMAGES

Turn = tuple[str, str]
MOST = 10  # things that somebody would count
VISIBLE = 0.004  # of the picture: smaller things are not counted
ABSENT = 2  # questions per photograph on things that are not there
SIDE = (
    "Is the {thing} on the left or on the right?",
    "Is the {thing} on the left or the right side of the {img}?",
    "On which side of the {img} is the {thing}?",
    "On which side is the {thing}?",
)


def count_turn(category: str, number: int, random_: random.Random) -> Turn:
    singular, plural = CATEGORIES[category].forms[0]
    question = random_.choice(HOW_MANY).format(many=plural, img=random_.choice(IMAGES))
    if random_.random() < 0.6 and question.endswith("?"):
        return question + SINGLE_PHRASE, str(number)
    word = NUMBER_WORDS.get(number, str(number)) if number else "no"
    be, name = ("is", singular) if number == 1 and singular else ("are", plural)
    return casual(question, random_), f"There {be} {word} {name}."


def count_turns(scene: Scene, seed: int) -> list[Turn]:
    """One question per category whose every thing is large enough to be counted, and two on absent ones."""
    random_ = rng(seed, "count", scene.photo.name)
    boxes = scene.boxes or ()
    counts = Counter(box.name for box in boxes)
    hidden = {box.name for box in boxes if box.area < VISIBLE}
    turns = [
        count_turn(name, number, random_)
        for name, number in sorted(counts.items())
        if name not in hidden and number <= MOST and CATEGORIES[name].forms[0][1]
    ]
    absent = [name for name in scene.absent() if CATEGORIES[name].forms[0][1]]
    picked = random_.sample(absent, min(ABSENT, len(absent))) if scene.boxes is not None else []
    return turns + [count_turn(name, 0, random_) for name in picked]


def side_turns(scene: Scene, seed: int) -> list[Turn]:
    """Left or right of things that are there once and clear of the middle."""
    random_ = rng(seed, "side", scene.photo.name)
    counts = Counter(box.name for box in scene.boxes or ())
    turns = []
    for box in scene.boxes or ():
        middle = (box.left + box.right) / 2
        singular = CATEGORIES[box.name].forms[0][0]
        if counts[box.name] > 1 or not singular or box.area < VISIBLE or 0.38 < middle < 0.62:
            continue
        side = "left" if middle < 0.5 else "right"
        question = random_.choice(SIDE).format(thing=singular, img=random_.choice(IMAGES))
        if random_.random() < 0.5:
            turns.append((question + SINGLE_PHRASE, capital(side)))
        else:
            turns.append((casual(question, random_), f"The {singular} is on the {side}."))
    return turns


def box_rows(scenes: Sequence[Scene], seed: int) -> tuple[list[Row], list[Row]]:
    """(rows on numbers, rows on sides, whose pictures may not be mirrored)."""
    counted, sides = [], []
    for scene in scenes:
        name, image = scene.photo.name, scene.photo.image
        counted += [row(f"count-{name}-{n}", image, [t]) for n, t in enumerate(count_turns(scene, seed))]
        sides += [row(f"side-{name}-{n}", image, [t]) for n, t in enumerate(side_turns(scene, seed))]
    return counted, sides
