"""Build a page that shows results: numbers beside LLaVA's, categories, and answers with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from pumice.errors import InputError
from pumice.evaluate.compare import format_points, verdict
from pumice.evaluate.files import ImageFile
from pumice.evaluate.page import bars, document, radar, table
from pumice.evaluate.published import PUBLISHED, SCALE
from pumice.evaluate.task import Answered, Task
from pumice.images import open_image
from pumice.webpage import jpeg_address

MAX_WRONG, MAX_RIGHT = 60, 20  # cards of wrong and of right answers
THUMBNAIL_SIDE = 256  # pixels of the longer side
MAX_CHARACTERS = 1500  # of a text on a card


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
    chosen: list[Card] = []
    for kind, max_cards in (("wrong", MAX_WRONG), ("right", MAX_RIGHT)):
        matches = [
            (answer, value)
            for answer, value in zip(answered, values, strict=True)
            if value is not None and (value < 0.5) == (kind == "wrong")
        ]
        chosen += [
            _card(answer, [(name, answer.text, value)], kind) for answer, value in _spread(matches, max_cards)
        ]
    return _with_images(task, data, chosen)


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
    chosen = [
        card
        for kind, group in kinds.items()
        for card in _spread(group, MAX_RIGHT if "same" in kind else MAX_WRONG)
    ]
    return _with_images(task, data, chosen)


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """Choose at most `limit` items, evenly over the list, so that every run shows the same ones."""
    if len(items) <= limit:
        return list(items)
    return [items[number * len(items) // limit] for number in range(limit)]


def _card(answer: Answered, answers: list[tuple[str, str, float | None]], kind: str) -> Card:
    meta = answer.question.meta
    truth = meta.get("answers", meta.get("answer", ""))
    if isinstance(truth, list | tuple):
        counts = {text: list(truth).count(text) for text in dict.fromkeys(truth)}
        truth = "; ".join(text if n == 1 else f"{text} ({n})" for text, n in counts.items())
    question = str(meta.get("question") or answer.question.prompt)
    if isinstance(meta.get("choices"), Mapping):
        question += "".join(f"\n{letter}. {text}" for letter, text in meta["choices"].items())
    return Card(answer.question.id, question, str(truth), answers, kind, str(meta.get("category") or ""))


def _with_images(task: Task, data: Path, chosen: list[Card]) -> list[Card]:
    # Scoring keeps no images, so the files are read again for the few that the page shows.
    cards_by_id = {card.id: card for card in chosen}
    remaining = len(cards_by_id)
    for question in task.questions(data):
        if remaining and (card := cards_by_id.get(question.id)) is not None:
            card.images = [_thumbnail(image) for image in question.images]
            remaining -= 1
        if not remaining:
            break
    return chosen


def _thumbnail(file: ImageFile) -> str:
    try:
        image = open_image(file.source()).convert("RGB")
    except (InputError, OSError):
        return ""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
    return jpeg_address(image, quality=75)


def page(results: Sequence[Mapping[str, Any]], shown: Sequence[Card] = ()) -> str:
    """Return the page of one model's results; `shown` are cards of the first result."""
    names = list(dict.fromkeys(str(result["model"]) for result in results))
    body = [_warnings(results), _numbers(results), _radar(results)]
    for result in results:
        body.append(_details(result))
    if shown:
        body.append(_gallery(shown, f"Answers of {_title(results[0])}"))
    return document("Evaluation of " + ", ".join(names), "\n".join(body), script=bool(shown))


def compare_page(comparison: Mapping[str, Any], shown: Sequence[Card]) -> str:
    """Return the page of a comparison (see `compare.compare`)."""
    first, second = comparison["models"]
    interval = comparison["interval"]
    rows = [
        [first, f"{comparison['values'][0]:.2f}"],
        [second, f"{comparison['values'][1]:.2f}"],
        [f"{first} minus {second}", format_points(comparison["difference"], "+")],
        ["95% interval", " to ".join(format_points(end, "+") for end in interval) if interval else "-"],
        ["p, paired bootstrap", "-" if comparison["p"] is None else f"{comparison['p']:.3g}"],
        ["p, McNemar", "-" if comparison["mcnemar"] is None else f"{comparison['mcnemar']:.3g}"],
        [f"{first} better", str(comparison["better"])],
        [f"{first} worse", str(comparison["worse"])],
    ]
    caption = f"{comparison['title']}, {comparison['headline']}, {comparison['questions']} questions"
    body = (
        _partial(comparison) + f"<p>{escape(verdict(comparison))}.</p>" + table(caption, ["", "value"], rows)
    )
    body += _gallery(shown, "Where they differ") if shown else "<p>They give the same answers.</p>"
    return document(f"{first} and {second} on {comparison['title']}", body, script=bool(shown))


def _warnings(results: Sequence[Mapping[str, Any]]) -> str:
    return "".join(_partial(result) for result in results)


def _partial(result: Mapping[str, Any]) -> str:
    if not result.get("partial"):
        return ""
    reason = escape(f"{result['title']}: {result['why_partial']}.")
    return f'<p class="partial"><strong>Partial:</strong> {reason}</p>'


def _title(result: Mapping[str, Any]) -> str:
    return result["title"] + (" (partial)" if result["partial"] else "")


def _value(result: Mapping[str, Any]) -> str:
    value = result["headline"]["value"]
    return "-" if value is None else f"{value:.1f}"


def _numbers(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for result in results:
        head = result["headline"]
        interval = head["interval"]
        numbers = [result["published"].get(model) for model in PUBLISHED]
        rows.append(
            [
                _title(result),
                head["name"],
                _value(result),
                f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "-",
                *("-" if number is None else f"{number:.1f}" for number in numbers),
                str(result["answered"]),
                result["split"],
                "drifted" if result["drift"].get("drifted") else "",
            ]
        )
    header = ["benchmark", "headline", "value", "95% interval", *PUBLISHED, "questions", "split", "drift"]
    notes = "".join(
        f"<li>{escape(result['title'])}: {escape(note)}</li>"
        for result in results
        for note in result["notes"]
    )
    return (
        "<h2>Numbers</h2>"
        + table("Beside what LLaVA publishes", header, rows)
        + (f'<ul class="note">{notes}</ul>' if notes else "")
    )


def _radar(results: Sequence[Mapping[str, Any]]) -> str:
    scored = [result for result in results if result["headline"]["value"] is not None]
    full_scales = [SCALE.get(result["task"], 100.0) for result in scored]
    shapes: dict[str, list[float | None]] = {
        "this model": [
            result["headline"]["value"] / full_scale
            for result, full_scale in zip(scored, full_scales, strict=True)
        ]
    }
    for model in PUBLISHED:
        shapes[model] = [
            result["published"][model] / full_scale if model in result["published"] else None
            for result, full_scale in zip(scored, full_scales, strict=True)
        ]
    drawing = radar([_title(result) for result in scored], shapes)
    return f"<h2>All at once</h2>{drawing}" if drawing else ""


def _details(result: Mapping[str, Any]) -> str:
    body = [f"<h2>{escape(_title(result))}: {_value(result)}</h2>"]
    metrics = {k: v for k, v in result["metrics"].items() if v is not None}
    rows = [[name, f"{value:.2f}"] for name, value in metrics.items()]
    body.append(table("All numbers", ["metric", "value"], rows))
    for title, cells in result["categories"].items():
        if not cells:
            continue
        scored = {name: cell for name, cell in cells.items() if cell["value"] is not None}
        full_scale = max(100.0, *(cell["value"] for cell in scored.values())) if scored else 100.0
        body.append(f"<h3>By {escape(title)}</h3>")
        body.append(
            bars(
                {n: (c["value"], f"{c['value']:.1f} ({c['questions']})") for n, c in scored.items()},
                full_scale,
            )
        )
    return "\n".join(body)


def _gallery(shown: Sequence[Card], title: str) -> str:
    kinds = list(dict.fromkeys(card.kind for card in shown))
    categories = sorted({card.category for card in shown if card.category})
    return (
        f'<h2>{escape(title)}</h2><div class="controls">'
        f"<label>Show {_select('kind', kinds, kinds[0])}</label>"
        f"<label>Category {_select('part', categories)}</label>"
        '<label>With the words <input id="words" type="search"></label>'
        '<span id="count" role="status" class="soft"></span></div>'
        f'<ul class="cards">{"".join(_card_html(card) for card in shown)}</ul>'
    )


def _select(name: str, values: Sequence[str], chosen: str = "") -> str:
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(value)}</option>'
        for value in values
    )
    return f'<select id="{name}"><option value="">all</option>{options}</select>'


def _card_html(card: Card) -> str:
    images = "".join(
        f'<img src="{source}" alt="picture {number} of question {escape(card.id)}" loading="lazy">'
        if source
        else '<p class="soft">(the picture is missing)</p>'
        for number, source in enumerate(card.images, 1)
    )
    answers = "".join(
        f'<dt>{escape(model)}</dt><dd class="{"good" if value is not None and value >= 0.5 else "bad"}">'
        f"{escape(_cut(text)) or '(nothing)'}{'' if value is None else f' [{value:.2f}]'}</dd>"
        for model, text, value in card.answers
    )
    return (
        f'<li data-kind="{escape(card.kind)}" data-part="{escape(card.category)}">{images}<dl>'
        f"<dt>Question {escape(card.id)}</dt><dd>{escape(_cut(card.question))}</dd>{answers}"
        f"<dt>Truth</dt><dd>{escape(_cut(card.truth))}</dd></dl></li>"
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"
