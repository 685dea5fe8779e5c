"""The report: one HTML file that needs no other file, to read rows and mark them.

All words that come from a teacher or a file are escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from pumice.data.rows import ImageFinder
from pumice.errors import InputError
from pumice.files import replacing
from pumice.images import open_image
from pumice.synth.checks import REASONS
from pumice.synth.statistics import LENGTHS, Statistics
from pumice.webpage import jpeg_address

THUMBNAIL = 320  # pixels, the longer side


def write(path: Path, statistics: Statistics, title: str, finder: ImageFinder | None) -> None:
    """Write the page in one piece."""
    parts = {
        "title": escape(title),
        "summary": _summary(statistics),
        "reasons": _reasons(statistics),
        "questions": _bars(statistics.questions.most_common(25)),
        "lengths": _lengths(statistics),
        "nouns": _bars(statistics.nouns.most_common(40)),
        "filters": _filters(statistics),
        "pictures": "".join(_picture(name, rows, finder) for name, rows in sorted(statistics.sample.items())),
        "key": escape(json.dumps(f"pumice marks {title}"), quote=False).replace("<", "\\u003c"),
    }
    page = (Path(__file__).parent / "report_page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found.group(1)], page)
    with replacing(path) as file:
        file.write(page)


def _summary(statistics: Statistics) -> str:
    total, rows = statistics.total, statistics.accepted
    share = f"{rows / total:.0%}" if total else "nothing"
    facts = [("requests", f"{total:,}"), ("rows kept", f"{rows:,}"), ("survived", share)]
    calls = statistics.calls
    if calls.get("calls"):
        failures = sum(calls.get("failures", {}).values())
        facts += [("calls", f"{calls['calls']:,}"), ("failed calls", f"{failures:,}")]
    if calls.get("tokens_in"):
        facts.append(("tokens in + out", f"{calls['tokens_in']:,} + {calls['tokens_out']:,}"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)


def _reasons(statistics: Statistics) -> str:
    kinds = sorted({*statistics.rows, *statistics.reasons})
    used = [r for r in REASONS if any(statistics.reasons[k][r] for k in kinds)]
    head = "".join(f'<th scope="col">{escape(r)}</th>' for r in ("requests", "kept", *used))
    lines = []
    for kind in kinds:
        total = statistics.rows[kind] + sum(statistics.reasons[kind].values())
        counts = [statistics.rows[kind], *(statistics.reasons[kind][r] for r in used)]
        cells = "".join(
            f'<td class="{style}">{count:,}<small>{count / total:.0%}</small></td>'
            for style, count in zip(["kept", *[""] * len(used)], counts, strict=True)
        )
        lines.append(f'<tr><th scope="row">{escape(kind)}</th><td>{total:,}</td>{cells}</tr>')
    return f'<thead><tr><th scope="col">kind</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'


def _bars(counts: Iterable[tuple[str, int]]) -> str:
    listed = list(counts)
    max_count = max((count for _, count in listed), default=1)
    return (
        "".join(
            f'<li><span>{escape(name)}</span><i style="width:{100 * count / max_count:.1f}%"></i>'
            f"<b>{count:,}</b></li>"
            for name, count in listed
        )
        or "<li>none</li>"
    )


def _lengths(statistics: Statistics) -> str:
    parts = []
    for kind in sorted(statistics.lengths):
        counts = statistics.lengths[kind]
        names = [f"{a} to {b - 1}" for a, b in pairwise(LENGTHS)] + [f"{LENGTHS[-1]} and more"]
        bars = _bars([(name, counts[n]) for n, name in zip(LENGTHS, names, strict=True) if counts[n]])
        parts.append(f'<section><h3>{escape(kind)}</h3><ul class="bars">{bars}</ul></section>')
    return "".join(parts)


def _filters(statistics: Statistics) -> str:
    kinds = sorted({*statistics.rows, *statistics.reasons})
    return "".join(f'<option value="{escape(kind)}">{escape(kind)}</option>' for kind in kinds)


def _picture(name: str, rows: list[dict[str, Any]], finder: ImageFinder | None) -> str:
    shown = "".join(_row(row) for row in rows)
    return (
        f'<article class="picture"><figure>{_thumbnail(name, finder)}<figcaption>{escape(name)}</figcaption>'
        f"</figure><div>{shown}</div></article>"
    )


def _thumbnail(name: str, finder: ImageFinder | None) -> str:
    if finder is None:
        return "<p>no picture folder was given</p>"
    try:
        image = open_image(finder.find(name))
    except InputError as error:
        return f"<p>{escape(str(error))}</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img loading="lazy" {size} alt="{escape(name)}" src="{jpeg_address(image, quality=80)}">'


def _row(row: dict[str, Any]) -> str:
    accepted = "conversations" in row
    if accepted:
        words = "".join(
            f'<p class="{escape(turn["from"])}">{escape(turn["value"].removeprefix("<image>").strip())}</p>'
            for turn in row["conversations"]
        )
        state = '<span class="ok">kept</span>'
    else:
        words = f'<p class="why">{escape(row["detail"])}</p><pre>{escape(row["reply"])}</pre>'
        state = f'<span class="no">{escape(row["reason"])}</span>'
    key = escape(row["id"])
    choices = "".join(
        f'<label><input type="radio" name="{key}" value="{value}"> {value}</label>'
        for value in ("good", "unsure", "bad")
    )
    return (
        f'<section class="row" data-id="{key}" data-kind="{escape(row["kind"])}" '
        f'data-state="{"kept" if accepted else "rejected"}">'
        f"<header><b>{escape(row['kind'])}</b> {state}</header>{words}"
        f'<footer role="group" aria-label="mark">{choices}'
        f'<input type="text" placeholder="a note" aria-label="note"></footer></section>'
    )
