"""Names of things: one photograph per ImageNet class."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rows.base import SINGLE_PHRASE, Row, capital, casual, rng, row, table, with_article
from rows.presence import IMAGES, MASS, SINGULAR, forced
from rows.prompts import ANIMAL_NAMING, NAMING

FOLDER = "imagenet-one-per-class"
# First and last WordNet id of runs of classes -> what they all are.
COARSE = (
    ("n01440764", "n01498041", "fish"),
    ("n01514668", "n01622779", "bird"),
    ("n01629819", "n01644900", "amphibian"),
    ("n01664065", "n01669191", "turtle"),
    ("n01675722", "n01695060", "lizard"),
    ("n01697457", "n01698640", "crocodile"),
    ("n01728572", "n01756291", "snake"),
    ("n01773157", "n01775062", "spider"),
    ("n01795545", "n01860187", "bird"),
    ("n02002556", "n02058221", "bird"),
    ("n02085620", "n02113978", "dog"),
    ("n02114367", "n02115913", "wild dog"),
    ("n02119022", "n02120505", "fox"),
    ("n02123045", "n02124075", "cat"),
    ("n02125311", "n02130308", "big cat"),
    ("n02132136", "n02134418", "bear"),
    ("n02165105", "n02281787", "insect"),
    ("n02480495", "n02483708", "ape"),
    ("n02484975", "n02494079", "monkey"),
    ("n02504013", "n02504458", "elephant"),
    ("n02514041", "n02655020", "fish"),
)
LAST_ANIMAL = "n02655020"
ANSWERS_ANIMAL = ("fish", "bird", "turtle", "lizard", "snake", "spider", "dog", "cat", "bear", "insect")
RENAMED = {key.strip(): name.strip() for key, name in (line.split("|") for line in table("names")[""])}


@dataclass(frozen=True)
class Named:
    """A photograph and its name: bare for a short answer, full with its article."""

    key: str
    image: str
    bare: str
    full: str
    coarse: str  # "dog", "bird", ... or ""
    animal: bool


def read_named(photos: Path) -> list[Named]:
    """The ImageNet photographs in order of WordNet id."""
    names_found = []
    for label in json.loads((photos / FOLDER / "labels.json").read_text(encoding="utf-8")):
        key = label["wordnet_id"]
        name = RENAMED.get(label["name"], label["name"])
        bare = name.removeprefix("=").removeprefix("a pair of ").removeprefix("a field of ")
        full = name.removeprefix("=") if name.startswith("=") else with_article(name)
        coarse = next((kind for first, last, kind in COARSE if first <= key <= last), "")
        names_found.append(
            Named(key, f"{FOLDER}/images/{label['file_name']}", bare, full, coarse, key <= LAST_ANIMAL)
        )
    return sorted(names_found, key=lambda named: named.key)


def naming_align(named: Sequence[Named], seed: int) -> list[Row]:
    """A naming sentence in the style of a caption, for alignment."""
    forms = ("A photo of {}.", "A picture of {}.", "A close-up of {}.", "An image of {}.", "This is {}.")
    rows = []
    for item in named:
        text = rng(seed, "naming-align", item.key).choice(forms).format(item.full)
        rows.append(row(f"align-{item.key}", item.image, [("", text)]))
    return rows


def naming_rows(named: Sequence[Named], seed: int) -> list[Row]:
    """Per picture: a full name, a short one, a caption, and yes/no on what it is and is not."""
    rows: list[Row] = []
    for item in named:
        random_ = rng(seed, "naming", item.key)
        turns = [_full(item, random_), _short(item, random_), *_yes_no(item, named, random_)]
        if item.animal and item.coarse in ANSWERS_ANIMAL:
            kind = with_article(item.coarse)
            question = random_.choice(ANIMAL_NAMING)
            same = item.coarse in item.bare.lower()
            turns.append((question, f"It is {item.full}." if same else f"It is {kind}, {item.full}."))
            turns.append((random_.choice(ANIMAL_NAMING) + SINGLE_PHRASE, capital(item.coarse)))
        rows += [row(f"naming-{item.key}-{n}", item.image, [turn]) for n, turn in enumerate(turns)]
    return rows


def _full(item: Named, random_: random.Random) -> tuple[str, str]:
    question = casual(random_.choice(NAMING), random_)
    forms = ("{}.", "This is {}.", "The {img} shows {}.", "It is {}.")
    answer = random_.choice(forms).format(item.full, img=random_.choice(("image", "picture", "photo")))
    return question, capital(answer)


def _short(item: Named, random_: random.Random) -> tuple[str, str]:
    return random_.choice(NAMING) + SINGLE_PHRASE, capital(item.bare)


def _yes_no(item: Named, named: Sequence[Named], random_: random.Random) -> list[tuple[str, str]]:
    """One yes and one no; half of the wrong names are of the same sort."""
    pool = [n for n in named if n.bare != item.bare and n.animal == item.animal]
    near = [n for n in pool if n.coarse and n.coarse != item.coarse] if random_.random() < 0.5 else pool
    wrong = random_.choice(near or pool or [n for n in named if n.bare != item.bare])
    turns = []
    for thing, answer in ((item, True), (wrong, False)):
        coarse = thing.coarse and (not answer or random_.random() < 0.7) and thing.coarse != item.coarse
        use_coarse = bool(coarse) or bool(answer and item.coarse and random_.random() < 0.7)
        bare, full = (thing.coarse, with_article(thing.coarse)) if use_coarse else (thing.bare, thing.full)
        img = random_.choice(IMAGES)
        if full == bare or full.startswith("a pair") or full.startswith("a field"):
            question = random_.choice(MASS[:3]).format(any=full, img=img).replace("any a ", "a ")
        else:
            question = random_.choice(SINGULAR).format(a=full, n=bare, img=img)
        if random_.random() < 0.5:
            turns.append((forced(question, random_), "Yes" if answer else "No"))
        elif answer:
            turns.append((casual(question, random_), f"Yes, this is {full}."))
        else:
            turns.append((casual(question, random_), f"No, this is {item.full}."))
    return turns
