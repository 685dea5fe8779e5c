"""Checks of training rows and their images, before any compute is spent on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pumice.conversation import Video
from pumice.data.images import DecodedImage, Looks, decode_all
from pumice.data.lookalikes import Lookalikes
from pumice.data.rows import ImageFinder, Rows
from pumice.data.scan import CheckedRow, Encode, Finding, Scan
from pumice.errors import InputError

# Reported, but the row is usable.
NOTES = (
    "wrong extension", "duplicate id", "<image> added", "also learned", "unit of boxes assumed",
    "boxes not used",
)  # fmt: skip


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
    held_out: Sequence[Rows] = (),
    workers: int = 0,
    progress: Callable[[], None] = lambda: None,
    decoded: Callable[[int, int], None] = lambda *_: None,
) -> DataReport:
    """Check every row of every source and report all problems.

    decode: decode every image once, in `workers` processes; 0 decodes in this one. budget: share of rows that
    may be unusable. encode: count a row's tokens; a row that is longer than `context` (unless `truncate`) or
    has no supervised tokens is unusable. With more than 0 workers and many rows it must be able to be
    pickled. held_out: rows whose pictures are compared with those of `rows`; what both have is noted.
    progress: called after each row. decoded: called with the number of images just decoded and the number of
    all. Raises InputError on a wrong budget or two sources of one name.
    """
    if not 0 <= budget <= 1:
        raise InputError(f"the budget is {budget}; give the share of rows that may be unusable, 0 to 1")
    # 1. Decode each file of an image or a video once, however many rows show it.
    report = DataReport(budget)
    rows = list(rows)
    opened: dict[Path | Video, DecodedImage] = {}
    if decode:
        files = _files([*rows, *held_out], finder)
        opened = decode_all(files, workers, lambda count: decoded(count, len(files)), compare=bool(held_out))
    scan = Scan([*rows, *held_out], finder, encode, decode, bool(held_out), workers)
    lookalikes = Lookalikes()
    for number, source in enumerate(rows):
        if source.source in report.sources:
            raise InputError(f"two sources are called '{source.source}'; give each its own name")
        counts = report.sources[source.source] = SourceReport(len(source))
        first_row: dict[str, int] = {}
        for row in scan.rows(number):
            # 2. Collect a row's problems. A malformed row has no id and no further checks.
            findings = _image_findings(row, opened, decode) + row.findings
            if not row.malformed and (first := first_row.setdefault(row.id, row.number)) != row.number:
                findings.append(("duplicate id", f"row {first} has the same id"))
            # 3. Count tokens of rows that are usable so far: others cannot be encoded.
            if encode is not None and _usable(findings):
                findings += _length_findings(row, context, truncate, counts)
            # 4. Add the row to the counts and its problems to the report.
            for looks in _looks(row, opened) if held_out else ():
                lookalikes.add(looks, f"row {row.number} of '{source.source}'")
            counts.usable += _usable(findings)
            counts.problems.update(kind for kind, _ in findings)
            report.problems += [
                Problem(kind, source.source, row.number, row.id, why) for kind, why in findings
            ]
            progress()
    # 5. A held-out picture that is also learned makes the held-out loss too good.
    for number, source in enumerate(held_out, len(rows)):
        for row in scan.rows(number):
            for looks in _looks(row, opened):
                how, name = lookalikes.find(looks)
                if how:
                    reason = f"its picture {how} that of {name}; keep it in one of them"
                    report.problems.append(Problem("also learned", source.source, row.number, row.id, reason))
    return report


def _usable(findings: list[Finding]) -> bool:
    return all(kind in NOTES for kind, _ in findings)


def _files(rows: list[Rows], finder: ImageFinder) -> list[Path | Video]:
    """Return the existing files of images and videos that rows name, each once, in order."""
    files: dict[Path | Video, None] = {}
    for source in rows:
        for image in source.contents.files():
            try:
                found = finder.find_any(image, source.opened.folder) if image else None
            except InputError:
                continue  # the missing image is reported with each row that names it
            if isinstance(found, Path | Video):
                files[found] = None
    return list(files)


def _image_findings(row: CheckedRow, opened: dict[Path | Video, DecodedImage], decode: bool) -> list[Finding]:
    findings = []
    for image in row.images:
        if image.missing:
            findings.append(("picture missing", image.missing))
            continue
        if isinstance(image.file, Path) and image.file.name != Path(image.name.replace("\\", "/")).name:
            findings.append(("wrong extension", f"picture {image.name!r} is stored as {image.file.name!r}"))
        result = opened.get(image.file) if image.file is not None else image.decoded
        if result is None or not decode:
            continue
        if result.unreadable:
            findings.append(("picture unreadable", result.unreadable))
        elif result.kind:
            findings.append(("wrong extension", f"picture {image.name!r} holds {result.kind}"))
    return findings


def _looks(row: CheckedRow, opened: dict[Path | Video, DecodedImage]) -> Iterable[Looks]:
    for image in row.images:
        result = opened.get(image.file) if image.file is not None else image.decoded
        if result is not None and result.looks is not None:
            yield result.looks


def _length_findings(
    row: CheckedRow, context: int | None, truncate: bool, counts: SourceReport
) -> list[Finding]:
    if row.not_encoded or row.tokens is None:
        return [("not encoded", row.not_encoded)]
    tokens, supervised = row.tokens
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


def fold(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Return problems in groups that differ in nothing but rows, numbers and names, in order of the first."""
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        # The place of a malformed row stands in its reason.
        same = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", problem.reason.rpartition(": ")[2])
        groups.setdefault((problem.source, problem.kind, same), []).append(problem)
    return list(groups.values())
