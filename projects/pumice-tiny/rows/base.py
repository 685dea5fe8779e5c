"""What every source shares: a photo, a row, and random numbers that depend on names alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.errors import CAUSE, InputError
from pumice.jsonl import wrong_json

Row = dict[str, Any]
SINGLE_PHRASE = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Photo:
    """One photograph and its cleaned captions. image: path relative to a picture root."""

    name: str
    image: str
    captions: tuple[str, ...]


def table(name: str) -> dict[str, list[str]]:
    """The lines of tables/NAME.txt by [section] ("" before the first), comments left out."""
    sections: dict[str, list[str]] = {"": []}
    section = ""
    for line in (Path(__file__).parent / "tables" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
            sections[section] = []
        elif line.strip() and not line.startswith("#"):
            sections[section].append(line)
    return sections


def read_lines(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises InputError, which names a line that lacks a field."""
    with wrong_json(f"'{path}' cannot be read: {CAUSE}"):
        text = path.read_text(encoding="utf-8")
    values = []
    # Not splitlines: it also splits at characters that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        label = f"'{path}', line {number}"
        with wrong_json(f"{label}: {CAUSE}", one_row=True):
            value = json.loads(line)
        if missing := [name for name in fields if not isinstance(value, dict) or name not in value]:
            raise InputError(f"{label} lacks {', '.join(missing)}")
        values.append(value)
    return values


def rng(seed: int, *names: str) -> random.Random:
    """A generator that depends on the seed and on names, not on the order of work."""
    return random.Random("/".join((str(seed), *names)))


def held_names(names: Iterable[str], count: int) -> set[str]:
    """The names with the smallest SHA-256: what is held out does not depend on what else there is."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count])


def row(row_id: str, image: str | None, turns: Sequence[tuple[str, str]]) -> Row:
    """A LLaVA-Instruct row of (question, answer) turns; the picture stands before the first one."""
    conversation = []
    for number, (question, answer) in enumerate(turns):
        if number == 0 and image is not None:
            question = f"<image>\n{question}" if question else "<image>"
        conversation.append({"from": "human", "value": question})
        conversation.append({"from": "gpt", "value": answer})
    if image is None:
        return {"id": row_id, "conversations": conversation}
    return {"id": row_id, "image": image, "conversations": conversation}


def article(phrase: str) -> str:
    """`a` or `an`, by the sound of the first letters."""
    word = phrase.lower()
    if word.startswith(("uni", "use", "eu", "one", "ukulele")):
        return "a"
    return "an" if word[:1] in "aeiou" or word.startswith("hour") else "a"


def with_article(phrase: str) -> str:
    return f"{article(phrase)} {phrase}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def plural(word: str) -> str:
    """A regular English plural; the tables spell out the others."""
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word + "s"


def casual(question: str, random_: random.Random) -> str:
    """Now and then a question as people type it: lower case, or without its question mark."""
    roll = random_.random()
    if roll < 0.06:
        return question[:1].lower() + question[1:]
    if roll < 0.12:
        return question.removesuffix("?")
    if roll < 0.16:
        lowered = question[:1].lower() + question[1:]
        return lowered.removesuffix("?").removesuffix(".")
    return question
