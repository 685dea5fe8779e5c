"""Checks of training rows and their images, before any compute is spent on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pumice.conversation import IMAGE_PLACEHOLDER, Conversation, from_llava
from pumice.data.images import DecodedImage, decode_all
from pumice.data.rows import ImageFinder, Row, Rows
from pumice.errors import InputError

Encode = Callable[[Conversation], tuple[int, int]]  # to (tokens, supervised tokens)
Finding = tuple[str, str]  # kind of problem, reason

NOTES = ("wrong extension", "duplicate id")  # reported, but the row is usable


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
    supervised: int = 0  # supervised tokens of the usable rows
    usable_tokens: int = 0  # all tokens of the usable rows
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
            # "lower" gives lengths that rows really have, not a value between two rows.
            median, high = np.percentile(self.tokens, [50, 95], method="lower").tolist()
            tokens = {
                "total": sum(self.tokens),
                "median": median,
                "percentile_95": high,
                "longest": max(self.tokens),
                "supervised_share": self.supervised / max(1, self.usable_tokens),
                "too_long_share": self.too_long / len(self.tokens),
                "histogram": self.histogram(),
            }
        return {"rows": self.rows, "usable": self.usable, "problems": dict(self.problems), "tokens": tokens}


@dataclass
class DataReport:
    """The result of a check: counts per source, and every problem row by row."""

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
    """Check every row of every source and report all problems.

    decode: decode every image once, in `workers` processes; 0 decodes in this one. budget: share of rows that
    may be unusable. encode: count a row's tokens; a row that is longer than `context` (unless `truncate`) or
    has no supervised tokens is unusable. progress: called after each row. decoded: called with the number of
    images just decoded and the number of all. Raises InputError on a wrong budget or two sources of one name.
    """
    if not 0 <= budget <= 1:
        raise InputError(f"the budget is {budget}; give the share of rows that may be unusable, 0 to 1")
    # 1. Decode each image once, however many rows show it.
    report = DataReport(budget)
    rows = list(rows)
    opened: dict[Path, DecodedImage] = {}
    if decode:
        paths = _paths(rows, finder)
        on_decoded = None if decoded is None else lambda count: decoded(count, len(paths))
        opened = decode_all(paths, workers, on_decoded)
    for source in rows:
        if source.source in report.sources:
            raise InputError(f"two sources are called '{source.source}'; give each its own name")
        counts = report.sources[source.source] = SourceReport(len(source))
        first_row: dict[str, int] = {}
        for number in range(1, len(source) + 1):
            # 2. Collect a row's problems. A malformed row has no id and no further checks.
            row_id = ""
            try:
                row = source[number - 1]
            except InputError as error:
                findings = [("malformed row", str(error))]
            else:
                row_id = row.id
                findings = _check_images(row, finder, opened, decode) + _check_turns(row)
                if (first := first_row.setdefault(row_id, number)) != number:
                    findings.append(("duplicate id", f"row {first} has the same id"))
                # 3. Count tokens of rows that are usable so far: others cannot be encoded.
                if encode is not None and _usable(findings):
                    findings += _check_lengths(row.conversation(finder), encode, context, truncate, counts)
            # 4. Add the row to the counts and its problems to the report.
            counts.usable += _usable(findings)
            counts.problems.update(kind for kind, _ in findings)
            report.problems += [Problem(kind, source.source, number, row_id, why) for kind, why in findings]
            if progress is not None:
                progress()
    return report


def _usable(findings: list[Finding]) -> bool:
    return all(kind in NOTES for kind, _ in findings)


def _paths(rows: list[Rows], finder: ImageFinder) -> list[Path]:
    """Return the existing images that rows name, each once, in order."""
    paths: dict[Path, None] = {}
    names: set[str] = set()
    for source in rows:
        for index in range(len(source)):
            try:
                new = [name for name in source[index].image if name not in names]
            except InputError:
                continue  # the malformed row is reported when it is checked
            for name in new:
                names.add(name)
                try:
                    paths[finder.find(name)] = None
                except InputError:
                    continue  # the missing image is reported with each row that names it
    return list(paths)


def _check_images(
    row: Row, finder: ImageFinder, opened: dict[Path, DecodedImage], decode: bool
) -> list[Finding]:
    findings = []
    for name in row.image:
        try:
            path = finder.find(name)
        except InputError as error:
            findings.append(("picture missing", str(error)))
            continue
        if path.name != Path(name).name:
            findings.append(("wrong extension", f"picture {name!r} is stored as {path.name!r}"))
        if decode and opened[path].unreadable:
            findings.append(("picture unreadable", opened[path].unreadable))
        elif decode and opened[path].kind:
            findings.append(("wrong extension", f"picture {name!r} holds {opened[path].kind}"))
    return findings


def _check_turns(row: Row) -> list[Finding]:
    try:
        from_llava(row.id, row.turns, row.image).check(answered=True)
    except InputError as error:
        return [(_turns_problem_kind(row), str(error))]
    return []


def _turns_problem_kind(row: Row) -> str:
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in row.turns if speaker == "human")
    if placeholders != len(row.image):
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


def _check_lengths(
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
    counts.usable_tokens += tokens
    return []
