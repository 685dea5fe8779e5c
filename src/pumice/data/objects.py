"""Read the `objects` of a row, names and boxes in ms-swift's form, and ask for them where a row has no words.

{"ref": ["a dog"], "bbox": [[l, t, r, b]], "bbox_type": "real" | "norm1" | "norm1000", "image_id": [0]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pumice.boxes import BoxError
from pumice.conversation import BOX_PLACEHOLDER, BOX_UNITS, REF_PLACEHOLDER, Objects
from pumice.data.sources.json_text import kind
from pumice.errors import InputError, counted, shorten

KEYS = {"ref", "bbox", "bbox_type", "image_id"}
LIST = "List the objects in this picture, each with its box."
# LLaVA-1.5's question about a box (its mixture, of RefCOCO and Visual Genome).
WHERE = "Please provide the bounding box coordinate of the region this sentence describes: "


def is_objects(value: Any) -> bool:
    """Return whether a column `objects` is in ms-swift's form; other programs mean other things by it."""
    return isinstance(value, Mapping) and "bbox" in value and not value.keys() - KEYS


def read_objects(value: Mapping[str, Any]) -> Objects:
    """Return the names and boxes of a row. Raises InputError where they are not of the form.

    A box that is None is left out: its thing has only a name.
    """
    values = {key: given for key, given in value.items() if given is not None}
    refs, boxes, numbers = (_list(values, key) for key in ("ref", "bbox", "image_id"))
    unit = values.get("bbox_type", "")
    if unit and unit not in BOX_UNITS:
        raise BoxError(
            "unknown unit of boxes", f"bbox_type is {shorten(unit)}; use one of {', '.join(BOX_UNITS)}"
        )
    if not all(isinstance(ref, str) for ref in refs):
        raise InputError("'ref' of 'objects' must be a list of texts")
    placed = [
        (_corners(box), number)
        for box, number in zip(boxes, _padded(numbers, len(boxes)), strict=False)
        if box is not None
    ]
    if not all(isinstance(number, int) and not isinstance(number, bool) for _, number in placed):
        raise InputError("'image_id' of 'objects' must be a list of whole numbers, counted from 0")
    return Objects(
        tuple(refs), tuple(box for box, _ in placed), str(unit), tuple(number for _, number in placed)
    )


def ask_for(
    value: Mapping[str, Any], question: str | None
) -> tuple[list[tuple[str, str]], Mapping[str, Any]]:
    """Return turns about a row that has only `objects`, and the objects in the order of the turns.

    The first turn lists all things. Another one asks for each name that occurs once, unless `question` is
    what should be asked instead.
    """
    refs, boxes = _list(value, "ref"), _list(value, "bbox")
    if len(refs) != len(boxes) or not refs:
        raise InputError(
            f"'objects' has {counted(len(refs), 'name')} in 'ref' and {counted(len(boxes), 'box')} in "
            "'bbox'; without words each box needs its name"
        )
    lines = [REF_PLACEHOLDER if box is None else f"{REF_PLACEHOLDER} {BOX_PLACEHOLDER}" for box in boxes]
    turns = [("human", question or LIST), ("gpt", "\n".join(lines))]
    if question is not None:
        return turns, value
    counts = Counter(map(str, refs))
    single = [n for n, ref in enumerate(refs) if counts[str(ref)] == 1 and boxes[n] is not None]
    for _ in single:
        turns += [("human", WHERE + REF_PLACEHOLDER), ("gpt", BOX_PLACEHOLDER)]
    numbers = _padded(_list(value, "image_id"), len(boxes))[: len(boxes)]
    return turns, {
        **value,
        "ref": [*refs, *(refs[n] for n in single)],
        "bbox": [*boxes, *(boxes[n] for n in single)],
        "image_id": [*numbers, *(numbers[n] for n in single)],
    }


def stored(objects: Objects) -> dict[str, Any]:
    """Return objects as a row has them: the inverse of `read_objects`."""
    return {
        "ref": list(objects.refs),
        "bbox": [list(corners) for corners in objects.boxes],
        **({"bbox_type": objects.unit} if objects.unit else {}),
        **({"image_id": list(objects.images)} if any(objects.images) else {}),
    }


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{key!r} of 'objects' must be a list, found {kind(value)}")
    return list(value)


def _padded(numbers: list[Any], count: int) -> list[Any]:
    """Return the numbers of boxes' pictures; as in ms-swift, boxes without one are of the first picture."""
    return [*numbers, *[0] * (count - len(numbers))]


def _corners(box: Any) -> tuple[float, float, float, float]:
    numbers = list(box) if isinstance(box, Sequence) and not isinstance(box, str) else []
    if len(numbers) != 4 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise BoxError(
            "box without numbers", f"the box {shorten(box)} is not four numbers: left, top, right, bottom"
        )
    try:
        left, top, right, bottom = map(float, numbers)
    except OverflowError as error:
        raise BoxError(
            "box without numbers", f"the box {shorten(box)} has a whole number that is too large; correct it"
        ) from error
    return left, top, right, bottom
