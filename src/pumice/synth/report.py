"""The report: one HTML file that needs no other file, to read rows and mark them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from pumice.data.rows import ImageFinder
from pumice.errors import InputError
from pumice.files import replacing
from pumice.images import open_image
from pumice.synth.checks import REASONS
from pumice.synth.statistics import LENGTHS, Statistics
from pumice.webpage import render, thumbnail

THUMBNAIL = 320  # pixels, the longer side
TEMPLATE = Path(__file__).parent / "report.html"


def write(path: Path, statistics: Statistics, title: str, finder: ImageFinder | None) -> None:
    """Write the page in one piece."""
    names = [f"{a} to {b - 1}" for a, b in pairwise(LENGTHS)] + [f"{LENGTHS[-1]} and more"]
    reasons = [reason for reason in REASONS if any(c[reason] for c in statistics.reasons.values())]
    kinds = {}
    for kind in sorted({*statistics.rows, *statistics.reasons}):
        counts = [statistics.rows[kind], *(statistics.reasons[kind][reason] for reason in reasons)]
        kinds[kind] = sum(counts), counts
    lengths = {
        kind: [(name, counts[n]) for n, name in zip(LENGTHS, names, strict=True) if counts[n]]
        for kind, counts in sorted(statistics.lengths.items())
    }
    pictures = [(name, _image(name, finder), rows) for name, rows in sorted(statistics.sample.items())]
    page = render(
        TEMPLATE, title=title, facts=_facts(statistics), reasons=reasons, kinds=kinds, lengths=lengths,
        questions=statistics.questions.most_common(25), nouns=statistics.nouns.most_common(40),
        pictures=pictures,
    )  # fmt: skip
    with replacing(path) as file:
        file.write(page)


def _facts(statistics: Statistics) -> list[tuple[str, str]]:
    total, rows, calls = statistics.total, statistics.accepted, statistics.calls
    share = f"{rows / total:.0%}" if total else "nothing"
    facts = [("requests", f"{total:,}"), ("rows kept", f"{rows:,}"), ("survived", share)]
    if calls.get("calls"):
        failures = sum(calls.get("failures", {}).values())
        facts += [("calls", f"{calls['calls']:,}"), ("failed calls", f"{failures:,}")]
    if calls.get("tokens_in"):
        facts.append(("tokens in + out", f"{calls['tokens_in']:,} + {calls['tokens_out']:,}"))
    return facts


def _image(name: str, finder: ImageFinder | None) -> dict[str, Any]:
    if finder is None:
        return {"problem": "no picture folder was given"}
    try:
        address, size = thumbnail(open_image(finder.find(name)), THUMBNAIL, quality=80)
    except InputError as error:
        return {"problem": str(error)}
    return {"problem": "", "address": address, "size": size}
