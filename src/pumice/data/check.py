"""Checks of training rows before any compute is spent on them.

Knows: rows, pictures, and what can be wrong with either. Does not know: templates, tokenizers;
lengths come from a function that the caller gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pumice.conversation import IMAGE_PLACEHOLDER, Conversation, from_llava
from pumice.data.pictures import DecodedImage, decode_all
from pumice.data.rows import ImageFinder, Row, Rows
from pumice.errors import InputError

Encode = Callable[[Conversation], tuple[int, int]]  # to (tokens, supervised tokens)
Finding = tuple[str, str]  # kind of problem, reason

NOTES = ("wrong extension", "duplicate id")  # reported, but the row can be used


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row."""

    kind: str
    source: str
    row: int  # from 1, as in error messages
    id: str
    reason: str


@dataclass
class SourceReport:
    """Counts of one source of rows."""

    rows: int
    usable: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)  # of each row that could be encoded
    supervised: int = 0  # tokens, of those rows that can be used, ...
    learnt_from: int = 0  # ... and all of their tokens
    too_long: int = 0  # rows with more tokens than the context

    def histogram(self) -> dict[str, int]:
        """Rows by their length in tokens, each bin twice the one before: {"up to 128": 40, ...}."""
        bins: Counter[int] = Counter(max(5, (tokens - 1).bit_length()) for tokens in self.tokens)
        if not bins:
            return {}
        return {f"up to {2**power}": bins[power] for power in range(min(bins), max(bins) + 1)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; "tokens" is None where nothing was encoded."""
        tokens = None
        if self.tokens:
            # lengths that rows have: between a short row and a very long one lies none
            median, high = np.percentile(self.tokens, [50, 95], method="lower").tolist()
            tokens = {
                "total": sum(self.tokens),
                "median": median,
                "percentile_95": high,
                "longest": max(self.tokens),
                "supervised_share": self.supervised / max(1, self.learnt_from),
                "too_long_share": self.too_long / len(self.tokens),
                "histogram": self.histogram(),
            }
        return {"rows": self.rows, "usable": self.usable, "problems": dict(self.problems), "tokens": tokens}


@dataclass
class DataReport:
    """What is wrong, per source and row by row."""

    budget: float
    sources: dict[str, SourceReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources.values())

    @property
    def usable(self) -> int:
        return sum(source.usable for source in self.sources.values())

    @property
    def ok(self) -> bool:
        """Whether the share of unusable rows is within the budget."""
        return self.rows - self.usable <= self.budget * self.rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "ok": self.ok,
            "rows": self.rows,
            "usable": self.usable,
            "budget": self.budget,
            "sources": {name: source.to_dict() for name, source in self.sources.items()},
            "problems": [asdict(problem) for problem in self.problems],
        }


def check(
    rows: Iterable[Rows],
    finder: ImageFinder,
    *,
    decode: bool = True,
    budget: float = 0.0,
    encode: Encode | None = None,
    context: int | None = None,
    truncate: bool = False,
    workers: int = 0,
    progress: Callable[[], None] | None = None,
    decoded: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at every row of every source, and go on after whatever is wrong.

    decode: open every picture, each once, in so many `workers` processes; 0 does it here. budget: the share
    of rows that may be unusable. encode: counts the tokens of a row; one longer than `context` (unless it
    is to be truncated), or with nothing supervised, is unusable. progress: called after each row. decoded:
    told how many pictures of how many more are open. Raises InputError on a wrong budget or two sources of
    one name.
    """
    if not 0 <= budget <= 1:
        raise InputError(f"the budget is {budget}; give the share of rows that may be unusable, 0 to 1")
    report = DataReport(budget)
    rows = list(rows)
    opened: dict[Path, DecodedImage] = {}
    if decode:
        paths = _paths(rows, finder)
        told = None if decoded is None else lambda more: decoded(more, len(paths))
        opened = decode_all(paths, workers, told)
    for source in rows:
        if source.source in report.sources:
            raise InputError(f"two sources are called '{source.source}'; give each its own name")
        counts = report.sources[source.source] = SourceReport(len(source))
        first_row: dict[str, int] = {}
        for number in range(1, len(source) + 1):
            row_id = ""
            try:
                row = source[number - 1]
            except InputError as error:
                found = [("malformed row", str(error))]
            else:
                row_id = row.id
                found = _pictures(row, finder, opened, decode) + _turns(row)
                if (first := first_row.setdefault(row_id, number)) != number:
                    found.append(("duplicate id", f"row {first} has the same id"))
                if encode is not None and _usable(found):
                    found += _lengths(row.conversation(finder), encode, context, truncate, counts)
            counts.usable += _usable(found)
            counts.problems.update(kind for kind, _ in found)
            report.problems += [Problem(kind, source.source, number, row_id, why) for kind, why in found]
            if progress is not None:
                progress()
    return report


def _usable(found: list[Finding]) -> bool:
    return all(kind in NOTES for kind, _ in found)


def _paths(rows: list[Rows], finder: ImageFinder) -> list[Path]:
    """The pictures that rows name and that are there, each once, in order."""
    found: dict[Path, None] = {}
    names: set[str] = set()
    for source in rows:
        for index in range(len(source)):
            try:
                new = [name for name in source[index].image if name not in names]
            except InputError:
                continue  # told of with the row itself
            for name in new:
                names.add(name)
                try:
                    found[finder.find(name)] = None
                except InputError:
                    continue  # told of with each row that names it
    return list(found)


def _pictures(row: Row, finder: ImageFinder, opened: dict[Path, DecodedImage], decode: bool) -> list[Finding]:
    found = []
    for name in row.image:
        try:
            path = finder.find(name)
        except InputError as error:
            found.append(("picture missing", str(error)))
            continue
        if path.name != Path(name).name:
            found.append(("wrong extension", f"picture {name!r} is stored as {path.name!r}"))
        if decode and opened[path].unreadable:
            found.append(("picture unreadable", opened[path].unreadable))
        elif decode and opened[path].kind:
            found.append(("wrong extension", f"picture {name!r} holds {opened[path].kind}"))
    return found


def _turns(row: Row) -> list[Finding]:
    try:
        from_llava(row.id, row.turns, row.image).check(answered=True)
    except InputError as error:
        return [(_kind_of_turns(row), str(error))]
    return []


def _kind_of_turns(row: Row) -> str:
    asked = sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in row.turns if speaker == "human")
    if asked != len(row.image):
        return "placeholder count"
    speakers = [speaker for speaker, _ in row.turns]
    if set(speakers) - {"human", "gpt", "system"}:
        return "unknown speaker"
    if any("\ud800" <= letter <= "\udfff" for _, text in row.turns for letter in text):
        return "broken text"
    if speakers[0] == "system":
        del speakers[0]
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        return "roles out of order"
    return "empty answer"


def _lengths(
    conversation: Conversation,
    encode: Encode,
    context: int | None,
    truncate: bool,
    counts: SourceReport,
) -> list[Finding]:
    try:
        tokens, supervised = encode(conversation)
    except InputError as error:
        return [("not encoded", str(error))]
    counts.tokens.append(tokens)
    if not supervised:
        return [("nothing supervised", f"none of the {tokens} tokens is learnt from")]
    long = context is not None and tokens > context
    counts.too_long += long
    if long and not truncate:
        return [("too long", f"{tokens} tokens, the context holds {context}")]
    counts.supervised += supervised
    counts.learnt_from += tokens
    return []
