"""Write an explanation as JSON for a browser, or as one HTML page that loads nothing else.

The page's behaviour is in page.js, which the server's page also uses.
"""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from typing import Any

import numpy as np

from pumice.explain.explanation import Explanation
from pumice.explain.methods import METHODS
from pumice.explain.reliance import likely
from pumice.moved import old_names
from pumice.webpage import head, thumbnail

LIMIT = 4 * 2**20  # bytes of attention in a page; if it takes more, heads, then layers are left out
SIDE = 1024  # pixels of an image's longer side in a page

_STYLE = """
:root { color-scheme: light dark; --back: #fff; }
@media (prefers-color-scheme: dark) { :root { --back: #141418; } }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem; background: var(--back); }
h1 { font-size: 1.4rem; margin: 0 0 1rem; }
"""


def to_json(explanation: Explanation, *, pictures: bool = True) -> dict[str, Any]:
    """Return the explanation as plain values, with large arrays as base64 of their bytes.

    "words": text, its range in the answer, log-probabilities (shown, grey, dropped), share of attention, and
    what both losses mean in words ("grey_said", "dropped_said").
    "methods": name, title, text, weights of each word on the image tokens. "attention": of all layers and
    heads; the row is (word * layers + layer) * heads + head. Packed rows are uint8 "values" times float32
    "scales", one per row. "pictures": size, range of tokens, their boxes as shares of the image (float32, N x
    4), and the image as a data address unless `pictures` is False.
    """
    reliance = explanation.reliance
    words = [
        {
            "text": word.text,
            "start": _utf16_position(explanation.answer, word.start),
            "end": _utf16_position(explanation.answer, word.end),
            "content": word.is_content,
            "shown": _number(reliance.shown[i]),
            "grey": _number(reliance.grey[i]),
            "dropped": _number(reliance.dropped[i]),
            "share": _number(reliance.share[i]),
            "grey_said": likely(float(reliance.loss_grey[i])),
            "dropped_said": likely(float(reliance.loss_dropped[i])),
        }
        for i, word in enumerate(explanation.words)
    ]
    attention, notes = _attention(explanation)
    return {
        "format": 1,
        "question": explanation.question,
        "answer": explanation.answer,
        "method": explanation.method,
        "chosen_layers": list(explanation.layers),
        "layers": explanation.attention.shape[1],
        "tokens": explanation.attention.shape[3],
        "words": words,
        "reliance": {
            "score": _number(reliance.score),
            "leans": reliance.leans,
            "attention": _number(reliance.attention),
            "verdict": reliance.verdict(),
        },
        "methods": [
            {
                "name": name,
                "title": METHODS[name].title,
                "text": METHODS[name].text,
                "weights": _pack(weights),
            }
            for name, weights in explanation.by_method.items()
        ],
        "attention": attention,
        "pictures": [_picture(explanation, number, pictures) for number in range(len(explanation.pictures))],
        "notes": [*notes, *_thin_image_notes(explanation)],
    }


def page(explanation: Explanation) -> str:
    """Return one HTML page. It loads nothing, and its policy forbids it."""
    folder = files("pumice.explain")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # Escape "<", so that no text of a model can end the script.
    data = json.dumps(to_json(explanation), ensure_ascii=False).replace("<", "\\u003c")
    title = f"Where the answer looked: {explanation.question}"
    return (
        f"{head(title, _STYLE + style)}"
        '<body class="px"><main><h1>Where the answer looked</h1><div id="explanation"></div></main>\n'
        f'<script id="data" type="application/json">{data}</script>\n'
        f'<script type="module">{script}\n'
        "mount(document.getElementById('explanation'), "
        "JSON.parse(document.getElementById('data').textContent));</script></body></html>\n"
    )


def _attention(explanation: Explanation) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the attention that fits in a page, and notes about what does not fit."""
    words, layers, heads, tokens = explanation.attention.shape
    if words * layers * heads * (tokens + 4) <= LIMIT:
        notes = [] if heads > 1 else ["The heads took too much room; layers are means over them."]
        return {"heads": heads, "packed": _pack(explanation.attention.reshape(-1, tokens))}, notes
    if words * layers * (tokens + 4) <= LIMIT:
        mean = explanation.attention.mean(2).reshape(-1, tokens)
        return {"heads": 1, "packed": _pack(mean)}, ["The page holds layers as means over their heads."]
    return None, ["The answer is too long for layers and heads in a page; Python gives them as arrays."]


def _pack(rows: np.ndarray) -> dict[str, Any]:
    """Pack rows (R, N) of numbers >= 0 as bytes, with one scale per row."""
    row_max = rows.max(1, initial=0)
    scales = (row_max / 255).astype("<f4")
    divisor = np.where(row_max > 0, row_max / 255, 1)
    values = np.rint(rows / divisor[:, None]).astype(np.uint8)
    return {"values": _base64(values.tobytes()), "scales": _base64(scales.tobytes()), "width": rows.shape[1]}


def _picture(explanation: Explanation, number: int, with_pixels: bool) -> dict[str, Any]:
    picture = explanation.pictures[number]
    width, height = picture.image.size
    grid = (picture.heat.shape[2], picture.heat.shape[1])
    boxes = picture.token_boxes.boxes / np.array([width, height, width, height])
    values: dict[str, Any] = {
        "width": width,
        "height": height,
        "grid": grid,
        "tokens": picture.tokens,
        "boxes": _base64(boxes.astype("<f4").tobytes()),
        "padding": [_number(value) for value in picture.padding],
        "occlusion": None if picture.occlusion is None else np.round(picture.occlusion, 4).tolist(),
        "occlusion_said": None
        if picture.occlusion is None
        else [likely(float(lost.max(initial=0))) for lost in picture.occlusion],
    }
    if with_pixels:
        values["source"] = thumbnail(picture.image, SIDE, quality=85)[0]
    return values


def _thin_image_notes(explanation: Explanation) -> list[str]:
    return [
        f"A picture of {image.width} × {image.height} pixels is so thin that the model sees little of it; "
        "it is stretched here."
        for image in (picture.image for picture in explanation.pictures)
        if max(image.size) > 12 * min(image.size)
    ]


def _utf16_position(text: str, position: int) -> int:
    """Convert a position in the text to UTF-16 units, as JavaScript counts."""
    return len(text[:position].encode("utf-16-le")) // 2


def _number(value: Any) -> float:
    return round(float(value), 5)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


__getattr__ = old_names(__name__)
