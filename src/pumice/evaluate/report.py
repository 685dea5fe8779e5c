"""Build a page that shows results: numbers beside LLaVA's, categories, and answers with their images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pumice.conversation import Video
from pumice.errors import InputError
from pumice.evaluate.compare import format_points, verdict
from pumice.evaluate.files import ImageFile
from pumice.evaluate.published import PUBLISHED
from pumice.evaluate.task import Answered, Task, releases
from pumice.images import open_image
from pumice.media import VideoPolicy
from pumice.video import read_frames
from pumice.webpage import render, thumbnail

TEMPLATE = Path(__file__).parent / "report.html"
MAX_WRONG, MAX_RIGHT = 60, 20  # cards of wrong and of right answers
THUMBNAIL_SIDE = 256  # pixels of the longer side
MAX_CHARACTERS = 1500  # of a text on a card
RADAR_SIZE, RADAR_MARGIN = 460, 80  # the margin holds the names of the axes


@dataclass
class Card:
    """A question on the page. answers: (model, its answer, the answer's score or None)."""

    id: str
    question: str
    truth: str
    answers: list[tuple[str, str, float | None]]
    kind: str  # "wrong" or "right", or who is better: the first filter of the page
    category: str  # the second filter
    images: list[str] = field(default_factory=list)  # data URLs; "" for a missing image


def cards(
    task: Task, data: Path, answered: Sequence[Answered], values: Sequence[float | None], name: str
) -> list[Card]:
    """Return cards of some wrong and some right answers, with thumbnails. values: each answer's score."""
    kinds: dict[str, list[Card]] = {"wrong": [], "right": []}
    for answer, value in zip(answered, values, strict=True):
        if value is not None:
            kind = "wrong" if value < 0.5 else "right"
            kinds[kind].append(_card(answer, [(name, answer.text, value)], kind))
    return _with_images(task, data, _spread(kinds["wrong"], MAX_WRONG) + _spread(kinds["right"], MAX_RIGHT))


def compared_cards(
    task: Task, data: Path, first: Sequence[Answered], second: Sequence[Answered], names: tuple[str, str]
) -> list[Card]:
    """Return cards of questions on which two models differ; "better" and "worse" refer to the first."""
    kinds: dict[str, list[Card]] = {f"{names[0]} better": [], f"{names[0]} worse": [], "same score": []}
    values = zip(task.score(first).values, task.score(second).values, strict=True)
    for a, b, (x, y) in zip(first, second, values, strict=True):
        if x is None or y is None or (x == y and a.text == b.text):
            continue
        kind = "same score" if x == y else f"{names[0]} {'better' if x > y else 'worse'}"
        kinds[kind].append(_card(a, [(names[0], a.text, x), (names[1], b.text, y)], kind))
    groups = (
        _spread(group, MAX_RIGHT if kind == "same score" else MAX_WRONG) for kind, group in kinds.items()
    )
    return _with_images(task, data, [card for group in groups for card in group])


def _spread(items: list[Card], limit: int) -> list[Card]:
    """Choose at most `limit` items, evenly over the list, so that every run shows the same ones."""
    chosen = min(limit, len(items))
    return [items[number * len(items) // chosen] for number in range(chosen)]


def _card(answer: Answered, answers: list[tuple[str, str, float | None]], kind: str) -> Card:
    meta = answer.question.meta
    truth = meta.get("answers", meta.get("answer", ""))
    if isinstance(truth, list | tuple):
        counts = {text: list(truth).count(text) for text in dict.fromkeys(truth)}
        truth = "; ".join(text if n == 1 else f"{text} ({n})" for text, n in counts.items())
    question = str(meta.get("question") or answer.question.prompt)
    if isinstance(meta.get("choices"), Mapping):
        question += "".join(f"\n{letter}. {text}" for letter, text in meta["choices"].items())
    cut_answers = [(model, _cut(text), value) for model, text, value in answers]
    category = str(meta.get("category") or "")
    return Card(answer.question.id, _cut(question), _cut(str(truth)), cut_answers, kind, category)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"


def _with_images(task: Task, data: Path, chosen: list[Card]) -> list[Card]:
    # Scoring keeps no images, so the files are read again for the few that the page shows.
    cards_by_id = {card.id: card for card in chosen}
    questions = task.questions(data) if chosen else ()
    for question in questions:
        if (card := cards_by_id.pop(question.id, None)) is not None:
            card.images = [_thumbnail(image) for image in question.images]
        if not cards_by_id:
            break
    return chosen


def _thumbnail(file: ImageFile) -> str:
    try:
        source = file.source()
        if isinstance(source, Video):  # its first frame
            [source] = read_frames(source, VideoPolicy(max_frames=1)).images
        return thumbnail(open_image(source), THUMBNAIL_SIDE, quality=75)[0]
    except (InputError, OSError):
        return ""


def page(results: Sequence[Mapping[str, Any]], shown: Sequence[Card] = ()) -> str:
    """Return the page of one model's results; `shown` are cards of the first result."""
    prepared = [_prepared(result) for result in results]
    title = "Evaluation of " + ", ".join(dict.fromkeys(str(result["model"]) for result in results))
    return render(
        TEMPLATE, title=title, comparison=None, results=prepared, models=list(PUBLISHED),
        numbers=[result["numbers"] for result in prepared], radar=_radar(prepared), cards=shown,
    )  # fmt: skip


def compare_page(comparison: Mapping[str, Any], shown: Sequence[Card]) -> str:
    """Return the page of a comparison (see `compare.compare`)."""
    first, second = comparison["models"]
    interval = comparison["interval"]
    rows = [
        (first, f"{comparison['values'][0]:.2f}"),
        (second, f"{comparison['values'][1]:.2f}"),
        (f"{first} minus {second}", format_points(comparison["difference"], "+")),
        ("95% interval", " to ".join(format_points(end, "+") for end in interval) if interval else "-"),
        ("p, paired bootstrap", "-" if comparison["p"] is None else f"{comparison['p']:.3g}"),
        ("p, McNemar", "-" if comparison["mcnemar"] is None else f"{comparison['mcnemar']:.3g}"),
        (f"{first} better", comparison["better"]),
        (f"{first} worse", comparison["worse"]),
    ]
    title = f"{first} and {second} on {comparison['title']}"
    return render(
        TEMPLATE, title=title, comparison=comparison, verdict=verdict(comparison), rows=rows, cards=shown
    )


def _prepared(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with its numbers as text: name, shown (the headline), rows of tables."""
    head, interval = result["headline"], result["headline"]["interval"]
    name = result["title"] + (" (partial)" if result["partial"] else "")
    shown = _text(head["value"])
    numbers = [
        name, head["name"], shown, f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "-",
        *(_text(result["published"].get(model)) for model in PUBLISHED),
        result["answered"], result["split"], "drifted" if result["drift"].get("drifted") else "",
    ]  # fmt: skip
    rows = [(metric, f"{value:.2f}") for metric, value in result["metrics"].items() if value is not None]
    return {**result, "name": name, "shown": shown, "numbers": numbers, "rows": rows}


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _radar(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the points of a radar, an outline per model from 0 in the middle to 1; None below three axes.

    A published number that is missing leaves a gap in its outline, because it is not a zero.
    """
    scored = [result for result in results if result["headline"]["value"] is not None]
    if len(scored) < 3:
        return None
    middle, radius = RADAR_SIZE / 2, RADAR_SIZE / 2 - RADAR_MARGIN

    def point(axis: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * axis / len(scored) - math.pi / 2
        x, y = middle + radius * value * math.cos(angle), middle + radius * value * math.sin(angle)
        return round(x, 1), round(y, 1)

    def shape(name: str, values: Sequence[float | None]) -> dict[str, Any]:
        known = {axis: point(axis, min(1.0, max(0.0, v))) for axis, v in enumerate(values) if v is not None}
        lines = [
            f"{'L' if axis - 1 in known else 'M'}{known[axis][0]} {known[axis][1]}" for axis in sorted(known)
        ]
        if 0 in known and len(values) - 1 in known:
            lines.append("Z" if len(known) == len(values) else f"L{known[0][0]} {known[0][1]}")
        return {"name": name, "path": " ".join(lines), "points": list(known.values()), "values": values}

    sources = [releases().get(result["task"]) for result in scored]
    scales = [source.scale if source else 100.0 for source in sources]
    headlines = {"this model": [result["headline"]["value"] for result in scored]}
    headlines |= {model: [result["published"].get(model) for result in scored] for model in PUBLISHED}
    shapes = [
        shape(name, [None if v is None else v / scale for v, scale in zip(values, scales, strict=True)])
        for name, values in headlines.items()
    ]
    axes = []
    for number, result in enumerate(scored):
        text = point(number, 1.12)
        anchor = "middle" if abs(text[0] - middle) < 20 else "start" if text[0] > middle else "end"
        axes.append({"name": result["name"], "end": point(number, 1.0), "text": text, "anchor": anchor})
    # All values stand in the label, for readers who cannot see the drawing.
    described = [
        f"{one['name']}: "
        + ", ".join(
            f"{axis['name']} {'-' if v is None else f'{v:.2f}'}"
            for axis, v in zip(axes, one["values"], strict=True)
        )
        for one in shapes
    ]
    rings = [
        " ".join("{},{}".format(*point(axis, ring)) for axis in range(len(scored)))
        for ring in (0.25, 0.5, 0.75, 1.0)
    ]
    scale = [(f"{100 * ring:.0f}", point(0, ring)) for ring in (0.25, 0.5, 0.75)]
    return {
        "size": RADAR_SIZE, "rings": rings, "axes": axes, "scale": scale, "shapes": shapes,
        "label": "; ".join(described),
    }  # fmt: skip
