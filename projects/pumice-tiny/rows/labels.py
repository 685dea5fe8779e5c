"""What COCO categories answer: what is there and what not, names, rooms, food, vehicles, animals, sports."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

from rows.base import SINGLE_PHRASE, Photo, Row, capital, casual, rng, row, with_article
from rows.coco import CATEGORIES, Scene
from rows.presence import IMAGES, Question, balance, forced
from rows.prompts import ANIMAL_NAMING

Turn = tuple[str, str]
PER_PHOTO = 4  # yes questions, and as many no
LISTED = 5  # things in one list at most
LIST = (
    "What objects are in the {img}?",
    "What things can you see in the {img}?",
    "Which things are in this {img}?",
    "List the objects in the {img}.",
    "Name the things that you see.",
    "What else is in the {img}?",
    "Which objects can you see here?",
    "Name everything that is in the {img}.",
)
ROOM = (
    "What room is this?",
    "What room is this?",
    "Which room is shown in the {img}?",
    "What kind of room is this?",
    "What type of room is in the {img}?",
    "In which room was this {img} taken?",
)
FOOD = (
    "What food is this?",
    "What food is in the {img}?",
    "What kind of food is shown in the {img}?",
    "What food can you see?",
    "What can be eaten here?",
    "What is there to eat?",
)
VEHICLE = (
    "What vehicle is in the {img}?",
    "What kind of vehicle is this?",
    "What vehicle is shown?",
    "Which vehicle can you see in the {img}?",
    "Name the vehicle.",
)
SPORT = (
    "What sport is this?",
    "What sport is being played?",
    "Which sport is shown in the {img}?",
    "What sport can you see in the {img}?",
    "What game or sport is in this {img}?",
)
ACTIVITY = (
    "What is the person doing?",
    "What are the people doing?",
    "What activity is shown in the {img}?",
    "What is somebody doing in this {img}?",
)
SETTING = (
    "Is this inside or outside?",
    "Was this {img} taken indoors or outdoors?",
    "Is the scene indoors or outdoors?",
    "Is this indoors or outdoors?",
)
# Room -> (any of these shows it, none of these may be there)
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bathroom": (("toilet",), ("bed", "couch", "oven", "refrigerator")),
    "bedroom": (("bed",), ("toilet", "oven", "refrigerator", "dining table", "microwave")),
    "kitchen": (("oven", "refrigerator", "microwave"), ("bed", "toilet", "couch")),
    "living room": (("couch",), ("bed", "toilet", "oven", "refrigerator", "microwave")),
}
SPORTS = {
    "tennis": ("tennis racket",),
    "baseball": ("baseball bat", "baseball glove"),
    "skiing": ("skis",),
    "snowboarding": ("snowboard",),
    "surfing": ("surfboard",),
    "skateboarding": ("skateboard",),
    "frisbee": ("frisbee",),
    "kite flying": ("kite",),
}
DOING = {
    "tennis": "playing tennis",
    "baseball": "playing baseball",
    "frisbee": "playing frisbee",
    "kite flying": "flying a kite",
}
INSIDE = frozenset(
    ("toilet", "bed", "oven", "microwave", "refrigerator", "couch", "tv", "keyboard", "sink", "hair drier")
)
OUTSIDE = frozenset(
    name for name, noun in CATEGORIES.items() if noun.kind in ("street", "sport") and name != "bench"
) - {"sports ball", "baseball glove", "tennis racket", "baseball bat", "skateboard", "frisbee"} | {
    *("airplane", "boat", "bus", "truck", "giraffe", "zebra", "elephant", "cow", "sheep")
}
STUFFED = {"bear", "teddy bear"}


def spoken_name(category: str) -> str:
    """The category as people say it, with its article."""
    singular, plural = CATEGORIES[category].forms[0]
    return with_article(singular) if singular and plural else singular or plural


def label_questions(scenes: Sequence[Scene], seed: int, per_photo: int = PER_PHOTO) -> list[Question]:
    """Yes/no questions on categories, as often with yes as with no for each of them.

    Small things are asked about where every thing has its box, for there alone their absence is sure.
    """
    labelled = {scene.photo.name: scene for scene in scenes if scene.labels is not None}
    absent = {name: scene.absent() for name, scene in labelled.items()}
    possible = Counter(category for categories in absent.values() for category in categories)
    counts = Counter(category for scene in labelled.values() for category in scene.labels or ())
    positives = []
    for name, scene in labelled.items():
        pick = rng(seed, "labels", "yes", name)
        names = [c for c in sorted(scene.labels or ()) if pick.random() < possible[c] / counts[c]]
        names.sort(key=lambda c: pick.random() ** (counts[c] ** 0.5), reverse=True)
        positives += [Question(scene.photo, c, True, "yes") for c in names[:per_photo]]
    photos = [scene.photo for scene in labelled.values()]

    def present(photo: Photo) -> Iterable[str]:
        return sorted(labelled[photo.name].labels or ())

    return balance(photos, positives, present, lambda photo: absent[photo.name], seed, per_photo)


def list_turn(scene: Scene, random_: random.Random) -> Turn | None:
    """Categories that are there, LISTED at most, in random order."""
    names = sorted(scene.labels or ())
    if not names:
        return None
    random_.shuffle(names)
    things = [spoken_name(name) for name in names[:LISTED]]
    text = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    question = random_.choice(LIST).format(img=random_.choice(IMAGES))
    return casual(question, random_), f"{capital(text)}."


def room_of(scene: Scene) -> str | None:
    labels = scene.labels or frozenset()
    rooms = [
        room
        for room, (some, never) in ROOMS.items()
        if not labels.isdisjoint(some) and labels.isdisjoint(never) and labels.isdisjoint(OUTSIDE)
    ]
    return rooms[0] if len(rooms) == 1 else None


def sport_of(scene: Scene) -> str | None:
    labels = scene.labels or frozenset()
    sports = [sport for sport, things in SPORTS.items() if not labels.isdisjoint(things)]
    return sports[0] if len(sports) == 1 and "person" in labels else None


def only(scene: Scene, kind: str) -> str | None:
    """The one category of a kind that is there, if it is one."""
    names = [name for name in scene.labels or () if CATEGORIES[name].kind == kind]
    return names[0] if len(names) == 1 else None


def naming_turns(scene: Scene, random_: random.Random) -> list[Turn]:
    """What the categories name: a room, a food, a vehicle, an animal, a sport, inside or outside."""
    turns = []
    labels = scene.labels or frozenset()
    if room := room_of(scene):
        turns.append(_named(ROOM, room, f"This is a {room}.", random_))
        other = random_.choice([r for r in ROOMS if r != room])
        asked, answer = random_.choice(((room, "Yes"), (other, "No")))
        turns.append(_yes_no(f"Is this a {asked}?", answer, f"this is a {room}", random_))
    if (food := only(scene, "food")) and "person" not in labels:
        turns.append(_named(FOOD, CATEGORIES[food].forms[0][0], f"{capital(spoken_name(food))}.", random_))
    if vehicle := only(scene, "vehicles"):
        turns.append(_named(VEHICLE, vehicle, f"{capital(spoken_name(vehicle))}.", random_))
    if (animal := only(scene, "animals")) and labels.isdisjoint(STUFFED - {animal}):
        turns.append(_named(ANIMAL_NAMING, animal, f"{capital(spoken_name(animal))}.", random_))
    if sport := sport_of(scene):
        turns.append(_named(SPORT, sport, f"{capital(sport)}.", random_))
        doing = DOING.get(sport, sport)
        turns.append(_named(ACTIVITY, doing, f"{capital(doing)}.", random_))
        other = random_.choice([s for s in SPORTS if s != sport])
        asked, answer = random_.choice(((doing, "Yes"), (DOING.get(other, other), "No")))
        full = f"somebody is {doing}"
        turns.append(_yes_no(f"Is somebody {asked} in the {random_.choice(IMAGES)}?", answer, full, random_))
    inside, outside = not labels.isdisjoint(INSIDE), not labels.isdisjoint(OUTSIDE)
    if inside != outside:
        words = ("inside", "indoors") if inside else ("outside", "outdoors")
        question = random_.choice(SETTING).format(img=random_.choice(IMAGES))
        answer = words["indoors" in question]
        turns.append((casual(question, random_), f"{capital(answer)}."))
    return turns


def _named(forms: Sequence[str], short: str, full: str, random_: random.Random) -> Turn:
    question = random_.choice(forms).format(img=random_.choice(IMAGES))
    if random_.random() < 0.4:
        return question + SINGLE_PHRASE, capital(short)
    return casual(question, random_), full


def _yes_no(question: str, answer: str, full: str, random_: random.Random) -> Turn:
    if random_.random() < 0.5:
        return forced(question, random_), answer
    return casual(question, random_), f"{answer}, {full}."


def list_rows(scenes: Sequence[Scene], seed: int) -> list[Row]:
    """One list of things per photograph."""
    rows = []
    for scene in scenes:
        if turn := list_turn(scene, rng(seed, "list", scene.photo.name)):
            rows.append(row(f"list-{scene.photo.name}", scene.photo.image, [turn]))
    return rows


def coco_naming_rows(scenes: Sequence[Scene], seed: int) -> list[Row]:
    return [
        row(f"coco-naming-{scene.photo.name}-{number}", scene.photo.image, [turn])
        for scene in scenes
        for number, turn in enumerate(naming_turns(scene, rng(seed, "coco-naming", scene.photo.name)))
    ]
