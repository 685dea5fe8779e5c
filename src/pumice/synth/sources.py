"""Read annotation files as contexts: COCO, Visual Genome, Flickr30k, and plain JSON Lines.

Everything that can be wrong with a file is found here, before the first call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pumice.data.rows import ImageFinder
from pumice.errors import InputError, official
from pumice.synth.context import BadRows, Box, Context, normalised
from pumice.synth.files import first_byte, items, json_lines, lines


class _Gathered:
    """Captions and boxes of pictures while the files of one source are read."""

    def __init__(self) -> None:
        self.images: dict[Any, tuple[str, float, float]] = {}  # id -> name, width, height
        self.captions: dict[Any, list[str]] = {}
        self.boxes: dict[Any, list[Box]] = {}

    def contexts(self, source: str, bad_rows: BadRows, file: Path) -> Iterator[Context]:
        for key, (name, _, _) in self.images.items():
            captions, boxes = self.captions.get(key, ()), self.boxes.get(key, ())
            if captions or boxes:
                yield Context(f"{source}/{Path(name).stem}", name, tuple(captions), tuple(boxes))
            else:
                bad_rows.add(f"'{file}': picture '{name}' (id {key}) has no annotation; remove it")


def coco(captions: Path | None, instances: Path | None, bad_rows: BadRows) -> Iterator[Context]:
    """COCO's captions_*.json and instances_*.json, either or both, in the order of their pictures.

    A picture that only one of the two files describes is used with what there is.
    """
    files = [file for file in (captions, instances) if file is not None]
    collected = _Gathered()
    for file in files:
        count = len(collected.images)
        for image in items(file, "images.item"):
            key, name = _field(image, "id", file), _field(image, "file_name", file)
            width, height = image.get("width") or 0, image.get("height") or 0
            known = collected.images.get(key)
            if known and known[0] != name:
                raise InputError(
                    f"'{file}': picture {key} is '{name}' here and '{known[0]}' in '{files[0]}'; give files "
                    "of one release"
                )
            collected.images[key] = (
                name,
                width or (known[1] if known else 0),
                height or (known[2] if known else 0),
            )
        if not collected.images or (file is captions and len(collected.images) == count):
            raise InputError(f"'{file}' lists no pictures under 'images'; give COCO's own file")
    if captions is not None:
        for note in items(captions, "annotations.item"):
            prefix = f"'{captions}', annotation {note.get('id')}"
            text, key = note.get("caption"), _field(note, "image_id", captions)
            if key not in collected.images:
                bad_rows.add(f"{prefix}: picture {key} is not in the file's list of pictures; remove it")
            elif not isinstance(text, str):
                raise InputError(f"{prefix} has no 'caption'; give the captions file of COCO, not another")
            elif not text.strip():
                bad_rows.add(f"{prefix}: the caption is empty; remove it")
            else:
                collected.captions.setdefault(key, []).append(" ".join(text.split()))
    if instances is not None:
        _coco_boxes(instances, collected, bad_rows)
    yield from collected.contexts("coco", bad_rows, files[0])


def _coco_boxes(file: Path, found: _Gathered, bad_rows: BadRows) -> None:
    names = {_field(c, "id", file): _field(c, "name", file) for c in items(file, "categories.item")}
    if not names:
        raise InputError(f"'{file}' lists no 'categories'; give the instances file of COCO")
    for note in items(file, "annotations.item"):
        prefix = f"'{file}', annotation {note.get('id')}"
        key, box = _field(note, "image_id", file), note.get("bbox")
        if key not in found.images:
            bad_rows.add(f"{prefix}: picture {key} is not in the file's list of pictures; remove it")
            continue
        if note.get("category_id") not in names:
            bad_rows.add(
                f"{prefix}: category {note.get('category_id')} is not among the {len(names)} listed; mend it"
            )
            continue
        _, width, height = found.images[key]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            bad_rows.add(f"{prefix}: 'bbox' is {box!r}; write left, top, width, height")
            continue
        left, top, wide, high = box
        corners = normalised((left, top, left + wide, top + high), width, height, prefix)
        if isinstance(corners, str):
            bad_rows.add(corners)
        else:
            found.boxes.setdefault(key, []).append(Box(names[note["category_id"]], corners))


def visual_genome(folder: Path, bad_rows: BadRows) -> Iterator[Context]:
    """Visual Genome's image_data.json with region_descriptions.json, objects.json, or both, in one folder.

    A region's phrase counts as a caption, an object's first name as its category.
    """
    sizes, regions, objects = (folder / f"{n}.json" for n in ("image_data", "region_descriptions", "objects"))
    if not regions.exists() and not objects.exists():
        raise InputError(f"'{folder}' holds neither region_descriptions.json nor objects.json; fetch one")
    collected = _Gathered()
    for image in items(sizes, "item"):
        key = image.get("image_id", image.get("id"))
        parts = str(image.get("url") or "").split("/")[-2:]
        name = "/".join(parts) if len(parts) == 2 else f"{key}.jpg"
        collected.images[key] = (name, image.get("width") or 0, image.get("height") or 0)
    if not collected.images:
        raise InputError(f"'{sizes}' lists no pictures; give Visual Genome's own file")
    for file, field in ((regions, "regions"), (objects, "objects")):
        for entry in items(file, "item") if file.exists() else ():
            key = entry.get("image_id", entry.get("id"))
            for note in entry.get(field) or ():
                prefix = f"'{file}', {field[:-1]} {note.get(f'{field[:-1]}_id')} of picture {key}"
                if key not in collected.images:
                    bad_rows.add(f"{prefix}: the picture is not in '{sizes.name}'; remove it")
                elif field == "regions":
                    phrase = " ".join(str(note.get("phrase") or "").split())
                    if phrase:
                        collected.captions.setdefault(key, []).append(phrase)
                    else:
                        bad_rows.add(f"{prefix}: the phrase is empty; remove it")
                else:
                    _vg_box(note, collected, key, prefix, bad_rows)
    yield from collected.contexts("vg", bad_rows, sizes)


def _vg_box(note: dict[str, Any], found: _Gathered, key: Any, where: str, bad_rows: BadRows) -> None:
    names = note.get("names") or [note.get("name")]
    left, top, wide, high = (note.get(n) for n in ("x", "y", "w", "h"))
    if not names[0]:
        bad_rows.add(f"{where} has no name; mend it")
    elif not all(isinstance(v, int | float) for v in (left, top, wide, high)):
        bad_rows.add(f"{where}: x, y, w and h are {left}, {top}, {wide}, {high}; write four numbers")
    else:
        _, width, height = found.images[key]
        assert left is not None and top is not None and wide is not None and high is not None
        corners = normalised((left, top, left + wide, top + high), width, height, where)
        if isinstance(corners, str):
            bad_rows.add(corners)
        else:
            found.boxes.setdefault(key, []).append(Box(str(names[0]), corners))


def flickr30k(file: Path, bad_rows: BadRows) -> Iterator[Context]:
    """Flickr30k's captions: results_*.token, results.csv with `|`, or Karpathy's dataset_flickr30k.json."""
    captions: dict[str, list[str]] = {}
    for where, name, text in _flickr(file):
        image_captions = captions.setdefault(name, [])
        if text.strip():
            image_captions.append(" ".join(text.split()))
        else:
            bad_rows.add(f"{where}: the caption is empty; remove it")
    for name, texts in captions.items():
        if texts:
            yield Context(f"flickr30k/{Path(name).stem}", name, tuple(texts))
    if not captions:
        raise InputError(f"'{file}' holds no captions; give Flickr30k's own file")


def _flickr(file: Path) -> Iterator[tuple[str, str, str]]:
    if first_byte(file) == "{":
        for image in items(file, "images.item"):
            name = _field(image, "filename", file)
            for sentence in image.get("sentences") or [{}]:
                yield f"'{file}', picture '{name}'", name, str(sentence.get("raw") or "")
        return
    for number, line in lines(file):
        prefix = f"'{file}', line {number}"
        if "\t" in line:
            name, text = line.split("\t", 1)
            yield prefix, name.split("#")[0].strip(), text
        elif "|" in line:
            if number > 1 or "image_name" not in line:
                name, _, text = (*line.split("|", 2), "", "")[:3]
                yield prefix, name.strip(), text
        else:
            raise InputError(f"{prefix}: neither 'picture#n<tab>caption' nor 'picture| n| caption'; mend it")


def plain(file: Path, bad_rows: BadRows) -> Iterator[Context]:
    """One object per line: image, and any of id, captions, boxes, text.

    boxes: [{"category": "dog", "box": [left, top, right, bottom]}], in pixels where the line gives width
    and height, else as shares of the sides.
    """
    for where, value in json_lines(file):
        image = value.get("image")
        if not isinstance(image, str) or not image:
            raise InputError(f"{where}: 'image' is {image!r}; write the path of a picture")
        captions = value.get("captions", [])
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise InputError(f"{where}: 'captions' must be a list of texts, found {captions!r}")
        if any(not c.strip() for c in captions):
            bad_rows.add(f"{where}: a caption is empty; remove it")
        boxes, sides = [], (value.get("width", 1), value.get("height", 1))
        if not all(isinstance(s, int | float) for s in sides):
            raise InputError(f"{where}: width and height are {sides[0]!r} and {sides[1]!r}; write numbers")
        for entry in value.get("boxes") or ():
            category = entry.get("category") if isinstance(entry, dict) else None
            if not isinstance(category, str) or not category.strip():
                bad_rows.add(f"{where}: the box {entry!r} has no category; write one")
                continue
            if not isinstance(box := entry.get("box"), list):
                bad_rows.add(
                    f"{where}: the box of '{category}' is {box!r}; write 'box': left, top, right, bottom"
                )
                continue
            corners = normalised(box, *sides, where)
            if isinstance(corners, str) and sides == (1, 1):
                corners += "; a box in pixels needs 'width' and 'height' in its line"
            if isinstance(corners, str):
                bad_rows.add(corners)
            else:
                boxes.append(Box(category.strip(), corners))
        texts = tuple(" ".join(c.split()) for c in captions if c.strip())
        text = str(value.get("text") or "").strip()
        if texts or boxes or text:
            yield Context(
                str(value.get("id") or Path(image).with_suffix("")), image, texts, tuple(boxes), text
            )
        else:
            bad_rows.add(f"{where}: picture '{image}' has neither captions nor boxes nor text; add some")


def gather(
    sources: Iterable[Iterator[Context]], finder: ImageFinder | None, bad_rows: BadRows, limit: int | None
) -> list[Context]:
    """The contexts of all sources, up to `limit`, each with its picture in `finder`'s folders.

    Raises InputError on two contexts of one id, on none at all, and beyond what `spoiled` allows.
    """
    kept: dict[str, Context] = {}
    with official(lambda: f"what stands behind the annotations of {len(kept)} pictures"):
        for context in itertools.chain.from_iterable(sources):
            if limit is not None and len(kept) >= limit:
                break
            if context.id in kept:
                raise InputError(f"two pictures have the id '{context.id}'; give each its own")
            if finder is not None:
                try:
                    finder.find(context.image)
                except InputError as error:
                    bad_rows.add(str(error))
                    continue
            kept[context.id] = context
    if not kept:
        raise InputError(
            "no picture with annotations is left; name more sources or look at the picture folder"
        )
    return list(kept.values())


def _field(value: Any, key: str, file: Path) -> Any:
    if not isinstance(value, dict) or value.get(key) is None:
        raise InputError(f"'{file}': an entry without '{key}': {str(value)[:80]}; give the official file")
    return value[key]
