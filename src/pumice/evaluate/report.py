"""One page that shows results: numbers beside LLaVA's, categories, and pictures with question, answer, truth.

Knows: results, details and pictures. Does not know: how they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from pumice.errors import InputError
from pumice.evaluate.compare import verdict
from pumice.evaluate.page import bars, document, radar, table
from pumice.evaluate.published import PUBLISHED, SCALE
from pumice.evaluate.task import Answered, Task
from pumice.images import open_image
from pumice.webpage import jpeg_address

WRONG, RIGHT = 60, 20  # cards at most
SIDE = 256  # pixels of a thumbnail's longer side
LONGEST = 1500  # characters of a text on a card


@dataclass
class Card:
    """A question as it is shown. answers: (who, what they said, how right it is)."""

    id: str
    question: str
    truth: str
    answers: list[tuple[str, str, float | None]]
    kind: str  # what the filter calls it
    part: str
    pictures: list[str] = field(default_factory=list)  # data addresses, or "" for a missing one


def cards(
    task: Task, data: Path, answered: Sequence[Answered], values: Sequence[float | None], name: str
) -> list[Card]:
    """Some wrong answers and some right ones, with thumbnails. values: how right each answer is."""
    chosen: list[Card] = []
    for kind, most in (("wrong", WRONG), ("right", RIGHT)):
        fits = [
            (answer, value)
            for answer, value in zip(answered, values, strict=True)
            if value is not None and (value < 0.5) == (kind == "wrong")
        ]
        chosen += [_card(answer, [(name, answer.text, value)], kind) for answer, value in _spread(fits, most)]
    return _with_pictures(task, data, chosen)


def compared_cards(
    task: Task, data: Path, first: Sequence[Answered], second: Sequence[Answered], names: tuple[str, str]
) -> list[Card]:
    """Where two models differ most, each kind bounded. Better and worse are said of the first."""
    kinds: dict[str, list[Card]] = {f"{names[0]} better": [], f"{names[0]} worse": [], "same score": []}
    values = zip(task.score(first).values, task.score(second).values, strict=True)
    for a, b, (x, y) in zip(first, second, values, strict=True):
        if x is None or y is None or (x == y and a.text == b.text):
            continue
        kind = "same score" if x == y else f"{names[0]} {'better' if x > y else 'worse'}"
        kinds[kind].append(_card(a, [(names[0], a.text, x), (names[1], b.text, y)], kind))
    chosen = [
        card for kind, found in kinds.items() for card in _spread(found, RIGHT if "same" in kind else WRONG)
    ]
    return _with_pictures(task, data, chosen)


def _spread(found: Sequence[Any], most: int) -> list[Any]:
    """At most so many, from all over the list, always the same."""
    return (
        [found[number * len(found) // most] for number in range(most)] if len(found) > most else list(found)
    )


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


def _with_pictures(task: Task, data: Path, chosen: list[Card]) -> list[Card]:
    wanted = {card.id: card for card in chosen}
    left = len(wanted)
    for question in task.questions(data):
        if left and (card := wanted.get(question.id)) is not None:
            card.pictures = [_thumbnail(picture) for picture in question.images]
            left -= 1
        if not left:
            break
    return chosen


def _thumbnail(picture: Any) -> str:
    try:
        image = open_image(picture.source()).convert("RGB")
    except (InputError, OSError):
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return jpeg_address(image, quality=75)


def page(results: Sequence[Mapping[str, Any]], shown: Sequence[Card] = ()) -> str:
    """The page of one model's results; cards belong to the first of them."""
    names = list(dict.fromkeys(str(found["model"]) for found in results))
    body = [_warnings(results), _numbers(results), _radar(results)]
    for found in results:
        body.append(_parts(found))
    if shown:
        body.append(_gallery(shown, f"Answers of {_title(results[0])}"))
    return document("Evaluation of " + ", ".join(names), "\n".join(body), script=bool(shown))


def compare_page(found: Mapping[str, Any], shown: Sequence[Card]) -> str:
    """The page of a comparison (see `compare.compare`)."""
    first, second = found["models"]
    interval = found["interval"]
    rows = [
        [first, f"{found['values'][0]:.2f}"],
        [second, f"{found['values'][1]:.2f}"],
        [f"{first} minus {second}", f"{found['difference']:+.2f}"],
        ["95% interval", f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "-"],
        ["p, paired bootstrap", "-" if found["p"] is None else f"{found['p']:.3g}"],
        ["p, McNemar", "-" if found["mcnemar"] is None else f"{found['mcnemar']:.3g}"],
        [f"{first} better", str(found["better"])],
        [f"{first} worse", str(found["worse"])],
    ]
    caption = f"{found['title']}, {found['headline']}, {found['questions']} questions"
    body = _partial(found) + f"<p>{escape(verdict(found))}.</p>" + table(caption, ["", "value"], rows)
    body += _gallery(shown, "Where they differ") if shown else "<p>They give the same answers.</p>"
    return document(f"{first} and {second} on {found['title']}", body, script=bool(shown))


def _warnings(results: Sequence[Mapping[str, Any]]) -> str:
    return "".join(_partial(found) for found in results)


def _partial(found: Mapping[str, Any]) -> str:
    if not found.get("partial"):
        return ""
    words = escape(f"{found['title']}: {found['why_partial']}.")
    return f'<p class="partial"><strong>Partial:</strong> {words}</p>'


def _title(found: Mapping[str, Any]) -> str:
    return found["title"] + (" (partial)" if found["partial"] else "")


def _value(found: Mapping[str, Any]) -> str:
    value = found["headline"]["value"]
    return "-" if value is None else f"{value:.1f}"


def _numbers(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for found in results:
        head = found["headline"]
        interval = head["interval"]
        numbers = [found["published"].get(model) for model in PUBLISHED]
        rows.append(
            [
                _title(found),
                head["name"],
                _value(found),
                f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "-",
                *("-" if number is None else f"{number:.1f}" for number in numbers),
                str(found["answered"]),
                found["split"],
                "drifted" if found["drift"].get("drifted") else "",
            ]
        )
    header = ["benchmark", "headline", "value", "95% interval", *PUBLISHED, "questions", "split", "drift"]
    notes = "".join(
        f"<li>{escape(found['title'])}: {escape(note)}</li>" for found in results for note in found["notes"]
    )
    return (
        "<h2>Numbers</h2>"
        + table("Beside what LLaVA publishes", header, rows)
        + (f'<ul class="note">{notes}</ul>' if notes else "")
    )


def _radar(results: Sequence[Mapping[str, Any]]) -> str:
    kept = [found for found in results if found["headline"]["value"] is not None]
    most = [SCALE.get(found["task"], 100.0) for found in kept]
    shapes: dict[str, list[float | None]] = {
        "this model": [found["headline"]["value"] / top for found, top in zip(kept, most, strict=True)]
    }
    for model in PUBLISHED:
        shapes[model] = [
            found["published"][model] / top if model in found["published"] else None
            for found, top in zip(kept, most, strict=True)
        ]
    drawn = radar([_title(found) for found in kept], shapes)
    return f"<h2>All at once</h2>{drawn}" if drawn else ""


def _parts(found: Mapping[str, Any]) -> str:
    body = [f"<h2>{escape(_title(found))}: {_value(found)}</h2>"]
    others = {k: v for k, v in found["metrics"].items() if v is not None}
    rows = [[name, f"{value:.2f}"] for name, value in others.items()]
    body.append(table("All numbers", ["metric", "value"], rows))
    for title, cells in found["categories"].items():
        if not cells:
            continue
        there = {name: cell for name, cell in cells.items() if cell["value"] is not None}
        top = max(100.0, *(cell["value"] for cell in there.values())) if there else 100.0
        body.append(f"<h3>By {escape(title)}</h3>")
        body.append(
            bars({n: (c["value"], f"{c['value']:.1f} ({c['questions']})") for n, c in there.items()}, top)
        )
    return "\n".join(body)


def _gallery(shown: Sequence[Card], title: str) -> str:
    kinds = list(dict.fromkeys(card.kind for card in shown))
    parts = sorted({card.part for card in shown if card.part})
    return (
        f'<h2>{escape(title)}</h2><div class="controls">'
        f"<label>Show {_select('kind', kinds, kinds[0])}</label>"
        f"<label>Category {_select('part', parts)}</label>"
        '<label>With the words <input id="words" type="search"></label>'
        '<span id="count" role="status" class="soft"></span></div>'
        f'<ul class="cards">{"".join(_one(card) for card in shown)}</ul>'
    )


def _select(name: str, values: Sequence[str], chosen: str = "") -> str:
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(value)}</option>'
        for value in values
    )
    return f'<select id="{name}"><option value="">all</option>{options}</select>'


def _one(card: Card) -> str:
    pictures = "".join(
        f'<img src="{source}" alt="picture {number} of question {escape(card.id)}" loading="lazy">'
        if source
        else '<p class="soft">(the picture is missing)</p>'
        for number, source in enumerate(card.pictures, 1)
    )
    answers = "".join(
        f'<dt>{escape(who)}</dt><dd class="{"good" if value is not None and value >= 0.5 else "bad"}">'
        f"{escape(_cut(text)) or '(nothing)'}{'' if value is None else f' [{value:.2f}]'}</dd>"
        for who, text, value in card.answers
    )
    return (
        f'<li data-kind="{escape(card.kind)}" data-part="{escape(card.part)}">{pictures}<dl>'
        f"<dt>Question {escape(card.id)}</dt><dd>{escape(_cut(card.question))}</dd>{answers}"
        f"<dt>Truth</dt><dd>{escape(_cut(card.truth))}</dd></dl></li>"
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
