"""Find the things that a text names, and whether a picture's annotations name them too.

A table holds things with their other names, plurals and negation. Annotations may leave out what is in the
picture, so a count of unsupported things is a sign, not a proof.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from pumice.synth.context import Context

_WORD = re.compile(r"[a-z]+")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_DENIAL = re.compile(
    r"\b(no|not|none|nor|neither|never|nobody|nothing|without|cannot|unable|unclear|impossible|absent|missing)"
    r"\b|n[’']t\b",
    re.I,
)


@lru_cache(maxsize=100_000)
def singular(word: str) -> str:
    """An English noun's singular by rule; a word that is no plural comes back as it is."""
    if (irregular := _tables().plurals.get(word)) is not None:
        return irregular
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zes")):
        return word[:-2]
    return word[:-1]


@dataclass(frozen=True)
class _Tables:
    """The sections of tables/objects.txt."""

    names: dict[str, str]  # phrase -> name
    wider: dict[str, frozenset[str]]  # word -> names that support it
    vague: dict[str, tuple[frozenset[str], frozenset[str]]]  # word -> what may mean it; what tells against it
    ignored: list[str]  # phrases that name nothing
    plurals: dict[str, str]  # irregular plural -> singular


@cache
def _tables() -> _Tables:
    tables = _Tables({}, {}, {}, [], {})
    section = ""
    for line in (Path(__file__).parent / "tables" / "objects.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            name, _, rest = (part.strip() for part in line.partition("|"))
            words = [word.replace("_", " ") for word in rest.split()]
            if section == "people":
                also, may, unless = (frozenset(part.split()) for part in rest.split("|"))
                tables.wider[name], tables.vague[name] = also, (may, unless)
            elif section == "wider":
                tables.wider[name] = frozenset(words)
            elif section == "ignore":
                tables.ignored.append(name)
            elif section == "plurals":
                tables.plurals[name] = rest
            else:
                tables.names.update(dict.fromkeys([name, *words], name))
    return tables


class Vocabulary:
    """The things that can be found in a text: the table's, and the categories that annotations use."""

    def __init__(self, categories: Iterable[str] = ()) -> None:
        self.tables = _tables()
        phrases: dict[tuple[str, ...], str | None] = {
            tuple(singular(w) for w in _WORD.findall(phrase)): name
            for phrase, name in self.tables.names.items()
        }
        phrases |= {tuple(_WORD.findall(phrase)): None for phrase in self.tables.ignored}
        phrases |= {(word,): word for word in self.tables.wider}
        for category in categories:
            words = tuple(singular(w) for w in _WORD.findall(category.lower()))
            if words and phrases.get(words) is None and words != ("orange",):  # the fruit; else a colour
                phrases[words] = " ".join(words)
        self._starts: dict[str, list[tuple[tuple[str, ...], str | None]]] = {}
        for phrase, found in sorted(phrases.items(), key=lambda item: (-len(item[0]), item[0])):
            self._starts.setdefault(phrase[0], []).append((phrase, found))

    def named(self, text: str) -> list[str]:
        """The names of the things in a text, in order, repeats included."""
        words = [singular(word) for word in _WORD.findall(text.lower())]
        words = [part for word in words for part in word.split()]
        matches, position = [], 0
        while position < len(words):
            for phrase, name in self._starts.get(words[position], ()):
                if tuple(words[position : position + len(phrase)]) == phrase:
                    if name is not None:
                        matches.append(name)
                    position += len(phrase)
                    break
            else:
                position += 1
        return matches

    def known(self, context: Context) -> frozenset[str]:
        """The things that a picture's annotations name. A category that no table has stands for itself."""
        names: set[str] = set()
        for text in (*context.captions, context.text):
            names.update(self.named(text))
        for category in {box.category for box in context.boxes}:
            # COCO's `orange` is the fruit, which the word alone does not say.
            names.update(self.named(category) or [category.lower()])
            if category == "orange":
                names.add("orange fruit")
        if sum(box.category == "person" for box in context.boxes) > 1:
            names.add("people")
        return frozenset(names)

    def unsupported(self, text: str, known: frozenset[str]) -> list[str]:
        """The things that a text says are there and that `known` does not hold, each once, in order.

        Sentences that deny something are passed over: "there is no dog" names no dog.
        """
        found: dict[str, None] = {}
        for sentence in _SENTENCE.split(text):
            if not _DENIAL.search(sentence):
                found.update(dict.fromkeys(self.named(sentence)))
        return [name for name in found if not self._supported(name, known)]

    def _supported(self, name: str, known: frozenset[str]) -> bool:
        if name in known or self.tables.wider.get(name, frozenset()) & known:
            return True
        may, unless = self.tables.vague.get(name, (frozenset(), frozenset()))
        return bool(may & known) and not unless & known
