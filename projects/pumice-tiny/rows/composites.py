"""Pictures drawn for their exact answers: how many, which colour, where.

Simple shapes, and cut-outs of real things when a folder of Tux Paint stamps is given, are pasted on
plain grounds or on training photographs. Every picture is 224 pixels square.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from rows.base import Photo, rng

SIZE = 224
PHOTO_GROUNDS = 0.35
INK = {
    "red": (214, 32, 38),
    "green": (34, 150, 60),
    "blue": (36, 76, 208),
    "yellow": (247, 215, 24),
    "orange": (245, 133, 24),
    "purple": (126, 44, 166),
    "pink": (246, 130, 184),
    "brown": (122, 74, 36),
    "black": (18, 18, 18),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "rectangle", "cross")
STAMP_FOLDERS = ("animals", "food", "vehicles", "household", "sports", "clothes", "plants/flowers", "hobbies")
_STAMP_NAME = re.compile(r"^(?:A|An) ((?:[a-z]+ ){0,2}[a-z]+)\.$")
_UNFIT_STAMPS = re.compile(
    r"baby|male|cep|xanthia|dumper|cylinder|wapiti|cherimoya|clothespin|root|pattypan|gnu|zebu|rhea|nandou|"
    r"covered|resembles|string|bunch|head of|pair of|quarter|sleeping|sitting|albino|aged|bolted|wrasse|"
    r"trout|petunia|pigface|gazania|mussel|abalone|tom drum|shell|wheel"
)


@dataclass(frozen=True)
class Thing:
    """Something to paste. colour: its colour when it has a single one, or ""."""

    name: str
    colour: str
    picture: Image.Image

    @property
    def label(self) -> str:
        return f"{self.colour} {self.name}".strip()


@dataclass(frozen=True)
class Placed:
    """A thing and the centre where it stands, pixels from the top left."""

    thing: Thing
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A drawn picture. arrangement: count, row (left to right), column (top to bottom), single.

    plain: the ground shows nothing; a photograph may show anything, so less can be asked.
    """

    image: str
    arrangement: str
    things: tuple[Placed, ...]
    plain: bool


def draw_shape(name: str, colour: str, side: int) -> Image.Image:
    """One shape with alpha, drawn four times as large and reduced."""
    big = side * 4
    picture = Image.new("RGBA", (big, big), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    ink = (*INK[colour], 255)
    middle = big / 2
    if name == "circle":
        pen.ellipse((0, 0, big - 1, big - 1), fill=ink)
    elif name == "square":
        pen.rectangle((big * 0.06, big * 0.06, big * 0.94, big * 0.94), fill=ink)
    elif name == "rectangle":
        pen.rectangle((0, big * 0.24, big - 1, big * 0.76), fill=ink)
    elif name == "triangle":
        pen.polygon([(middle, 0), (big - 1, big * 0.9), (0, big * 0.9)], fill=ink)
    elif name == "diamond":
        pen.polygon([(middle, 0), (big * 0.85, middle), (middle, big - 1), (big * 0.15, middle)], fill=ink)
    elif name == "cross":
        pen.rectangle((big * 0.36, 0, big * 0.64, big - 1), fill=ink)
        pen.rectangle((0, big * 0.36, big - 1, big * 0.64), fill=ink)
    elif name == "star":
        points = []
        for corner in range(10):
            radius = middle if corner % 2 == 0 else middle * 0.42
            angle = math.pi * corner / 5 - math.pi / 2
            points.append((middle + radius * math.cos(angle), middle + radius * math.sin(angle)))
        pen.polygon(points, fill=ink)
    else:  # heart
        pen.ellipse((0, big * 0.05, big * 0.54, big * 0.59), fill=ink)
        pen.ellipse((big * 0.46, big * 0.05, big - 1, big * 0.59), fill=ink)
        pen.polygon([(big * 0.05, big * 0.44), (big * 0.95, big * 0.44), (middle, big * 0.98)], fill=ink)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def read_stamps(folder: Path) -> list[Thing]:
    """The stamps whose caption is a plain name ("A zebra."); other files are passed over."""
    cut_outs_by_name: dict[str, Thing] = {}
    for sort in STAMP_FOLDERS:
        for path in sorted(folder.rglob(f"{sort}/**/*.png")):
            text = path.with_suffix(".txt")
            if not text.exists() or {"cartoon", "plastic", "toys"} & set(path.parts) or "mirror" in path.name:
                continue
            lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
            match = _STAMP_NAME.match(lines[0].strip()) if lines else None
            if match and not _UNFIT_STAMPS.search(match[1]) and match[1] not in cut_outs_by_name:
                with Image.open(path) as picture:
                    cut_out = picture.convert("RGBA")
                box = cut_out.getchannel("A").getbbox()
                if box is not None:
                    words = match[1].split()
                    colour = words[0] if words[0] in INK and len(words) > 1 else ""
                    name = match[1].removeprefix(colour).strip() if colour else match[1]
                    cut_outs_by_name[match[1]] = Thing(name, colour, cut_out.crop(box))
    return list(cut_outs_by_name.values())


def _ground(photo: Photo | None, root: Path, random_: random.Random, avoid: set[str]) -> Image.Image:
    """A softened photograph, or else a plain colour or a gradient."""
    roll = random_.random()
    if photo is not None:
        with Image.open(root / photo.image) as picture:
            ground = picture.convert("RGB").resize((SIZE, SIZE))
        return ground.filter(ImageFilter.GaussianBlur(random_.choice((2, 4, 6))))
    names = sorted(set(INK) - avoid) or ["white"]
    first = INK[random_.choice([*names, "white", "white"] if "white" not in avoid else names)]
    pale = tuple((c + 2 * 255) // 3 for c in first) if random_.random() < 0.6 else first
    if roll < 0.5:
        return Image.new("RGB", (SIZE, SIZE), pale)
    top, bottom = Image.new("RGB", (SIZE, SIZE), pale), Image.new("RGB", (SIZE, SIZE), (235, 235, 240))
    mask = Image.linear_gradient("L").resize((SIZE, SIZE))
    return Image.composite(bottom, top, mask)


def _fit(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    return picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
        Image.Resampling.LANCZOS,
    )


def _shape(random_: random.Random, side: int, names: set[str], inks: set[str]) -> Thing:
    name = random_.choice([n for n in SHAPES if n not in names])
    colour = random_.choice([c for c in INK if c not in inks])
    return Thing(name, colour, draw_shape(name, colour, side))


def _pick(stamps: Sequence[Thing], random_: random.Random, number: int) -> list[Thing]:
    """Different things: all stamps or all shapes."""
    if stamps and random_.random() < 0.6:
        chosen: list[Thing] = []
        for thing in random_.sample(list(stamps), min(len(stamps), 6 * number)):
            if all(not set(thing.name.split()) & set(other.name.split()) for other in chosen):
                chosen.append(thing)
            if len(chosen) == number:
                return chosen
    names: set[str] = set()
    inks: set[str] = set()
    things = []
    for _ in range(number):
        thing = _shape(random_, 80, names, inks)
        names.add(thing.name)
        inks.add(thing.colour)
        things.append(thing)
    return things


def _count_places(number: int, random_: random.Random) -> list[tuple[int, int]]:
    """Cells of a 3 x 3 grid, a little off their centres."""
    cells = random_.sample([(x, y) for x in range(3) for y in range(3)], number)
    return [(37 + 75 * x + random_.randint(-7, 7), 37 + 75 * y + random_.randint(-7, 7)) for x, y in cells]


def draw_scene(
    number: int, part: str, photos: Sequence[Photo], root: Path, out: Path, stamps: Sequence[Thing], seed: int
) -> Scene:
    """Draw and write one picture below `out`/composites; returns what it shows."""
    random_ = rng(seed, "composite", part, str(number))
    arrangement = random_.choice(("count", "count", "row", "row", "row", "column", "column", "single"))
    if arrangement == "count":
        kinds = _pick(stamps, random_, random_.choice((1, 1, 2)))
        amounts = [random_.randint(1, 6)] + [random_.randint(1, 3) for _ in kinds[1:]]
        listed = [thing for thing, amount in zip(kinds, amounts, strict=True) for _ in range(amount)]
        places = _count_places(len(listed), random_)
        side = random_.randint(52, 64)
    elif arrangement == "single":
        listed = _pick(stamps, random_, 1)
        side = random_.randint(90, 170)
        places = [(112 + random_.randint(-20, 20), 112 + random_.randint(-20, 20))]
    else:
        amount = random_.choice((2, 2, 3))
        listed = _pick(stamps, random_, amount)
        side = random_.randint(62, 70) if amount == 3 else random_.randint(70, 98)
        steps = [round(SIZE * (2 * step + 1) / (2 * amount)) for step in range(amount)]
        wander = 25 if arrangement == "row" and amount == 2 else 12
        across = [112 + random_.randint(-wander, wander) for _ in steps]
        places = list(zip(steps, across, strict=True))
        if arrangement == "column":
            places = [(y, x) for x, y in places]
    photo = random_.choice(photos) if photos and random_.random() < PHOTO_GROUNDS else None
    canvas = _ground(photo, root, random_, {thing.colour for thing in listed})
    placed = []
    for thing, (x, y) in zip(listed, places, strict=True):
        picture = _fit(thing.picture, side)
        canvas.paste(picture, (x - picture.width // 2, y - picture.height // 2), picture)
        placed.append(Placed(thing, x, y))
    image = f"composites/{part}-{number:05}.jpg"
    (out / "composites").mkdir(parents=True, exist_ok=True)
    canvas.save(out / image, quality=92)
    return Scene(image, arrangement, tuple(placed), plain=photo is None)
