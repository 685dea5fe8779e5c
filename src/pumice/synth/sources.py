"""Read annotation files as contexts: COCO, Visual Genome, Flickr30k, and plain JSON Lines.

Everything that can be wrong with a file is found here, before the first call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from pumice.data.rows import ImageFinder
from pumice.errors import InputError, counted, official
from pumice.synth.context import AnnotatedBox, BadAnnotation, BadRows, Context, normalised
from pumice.synth.files import first_byte, items, json_lines, lines, visual_genome_images


class _Gathered:
    """Captions and boxes of pictures while the files of one source are read."""

    def __init__(self, listing: str) -> None:
        self.listing = listing  # of its pictures, for messages
        self.images: dict[Any, tuple[str, float, float]] = {}  # id -> name, width, height
        self.captions: dict[Any, list[str]] = {}
        self.boxes: dict[Any, list[AnnotatedBox]] = {}

    def check_listed(self, key: Any, where: str) -> None:
        if key not in self.images:
            raise BadAnnotation(f"{where}: picture {key} is not in {self.listing}; remove it")

    def add_caption(self, key: Any, text: str, where: str, what: str = "caption") -> None:
        self.captions.setdefault(key, []).append(_words(text, where, what))

    def add_box(self, key: Any, category: str, box: Sequence[float], where: str) -> None:
        """Add a box of pixels: left, top, width, height."""
        _, width, height = self.images[key]
        left, top, wide, high = box
        corners = normalised((left, top, left + wide, top + high), width, height, where)
        self.boxes.setdefault(key, []).append(AnnotatedBox(category, corners))

    def contexts(self, source: str, bad_rows: BadRows, file: Path) -> Iterator[Context]:
        for key, (name, _, _) in self.images.items():
            captions, boxes = self.captions.get(key, ()), self.boxes.get(key, ())
            with bad_rows.tolerated():
                if not captions and not boxes:
                    raise BadAnnotation(f"'{file}': picture '{name}' (id {key}) has no annotation; remove it")
                yield Context(f"{source}/{Path(name).stem}", name, tuple(captions), tuple(boxes))


def _words(text: str, where: str, what: str = "caption") -> str:
    if not text.strip():
        raise BadAnnotation(f"{where}: the {what} is empty; remove it")
    return " ".join(text.split())


def coco(captions: Path | None, instances: Path | None, bad_rows: BadRows) -> Iterator[Context]:
    """COCO's captions_*.json and instances_*.json, either or both, in the order of their pictures.

    A picture that only one of the two files describes is used with what there is.
    """
    files = [file for file in (captions, instances) if file is not None]
    found = _Gathered("the file's list of pictures")
    # 1. The pictures of both files, which must agree about their names.
    for file in files:
        count = len(found.images)
        for image in items(file, "images"):
            key, name = _field(image, "id", file), _field(image, "file_name", file)
            known, width, height = found.images.get(key, (name, 0, 0))
            if known != name:
                raise InputError(
                    f"'{file}': picture {key} is '{name}' here and '{known}' in '{files[0]}'; give files "
                    "of one release"
                )
            found.images[key] = (name, image.get("width") or width, image.get("height") or height)
        if not found.images or (file is captions and len(found.images) == count):
            raise InputError(f"'{file}' lists no pictures under 'images'; give COCO's own file")
    # 2. Captions, then boxes.
    for note in items(captions, "annotations") if captions is not None else ():
        prefix = f"'{captions}', annotation {note.get('id')}"
        text, key = note.get("caption"), _field(note, "image_id", files[0])
        with bad_rows.tolerated():
            found.check_listed(key, prefix)
            if not isinstance(text, str):
                raise InputError(f"{prefix} has no 'caption'; give the captions file of COCO, not another")
            found.add_caption(key, text, prefix)
    if instances is not None:
        _coco_boxes(instances, found, bad_rows)
    yield from found.contexts("coco", bad_rows, files[0])


def _coco_boxes(file: Path, found: _Gathered, bad_rows: BadRows) -> None:
    names = {_field(c, "id", file): _field(c, "name", file) for c in items(file, "categories")}
    if not names:
        raise InputError(f"'{file}' lists no 'categories'; give the instances file of COCO")
    for note in items(file, "annotations"):
        prefix = f"'{file}', annotation {note.get('id')}"
        key, category, box = _field(note, "image_id", file), note.get("category_id"), note.get("bbox")
        with bad_rows.tolerated():
            found.check_listed(key, prefix)
            if category not in names:
                raise BadAnnotation(
                    f"{prefix}: category {category} is not among the {len(names)} listed; mend it"
                )
            if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
                raise BadAnnotation(f"{prefix}: 'bbox' is {box!r}; write left, top, width, height")
            found.add_box(key, names[category], box, prefix)


def visual_genome(folder: Path, bad_rows: BadRows) -> Iterator[Context]:
    """Visual Genome's image_data.json with region_descriptions.json, objects.json, or both, in one folder.

    A region's phrase counts as a caption, an object's first name as its category.
    """
    sizes, regions, objects = (folder / f"{n}.json" for n in ("image_data", "region_descriptions", "objects"))
    if not regions.exists() and not objects.exists():
        raise InputError(f"'{folder}' holds neither region_descriptions.json nor objects.json; fetch one")
    found = _Gathered(f"'{sizes.name}'")
    for key, name, image in visual_genome_images(sizes):
        found.images[key] = (name, image.get("width") or 0, image.get("height") or 0)
    if not found.images:
        raise InputError(f"'{sizes}' lists no pictures; give Visual Genome's own file")
    for file, what in ((regions, "region"), (objects, "object")):
        for entry in items(file) if file.exists() else ():
            key = entry.get("image_id", entry.get("id"))
            for note in entry.get(f"{what}s") or ():
                prefix = f"'{file}', {what} {note.get(f'{what}_id')} of picture {key}"
                with bad_rows.tolerated():
                    found.check_listed(key, prefix)
                    if what == "region":
                        found.add_caption(key, str(note.get("phrase") or ""), prefix, "phrase")
                    else:
                        _vg_box(note, found, key, prefix)
    yield from found.contexts("vg", bad_rows, sizes)


def _vg_box(note: dict[str, Any], found: _Gathered, key: Any, where: str) -> None:
    names, box = note.get("names") or [note.get("name")], [note.get(n) for n in ("x", "y", "w", "h")]
    if not names[0]:
        raise BadAnnotation(f"{where} has no name; mend it")
    if not _are_numbers(box):
        raise BadAnnotation(f"{where}: x, y, w and h are {', '.join(map(str, box))}; write four numbers")
    found.add_box(key, str(names[0]), box, where)


def _are_numbers(values: Sequence[Any]) -> TypeGuard[Sequence[float]]:
    return all(isinstance(value, int | float) for value in values)


def flickr30k(file: Path, bad_rows: BadRows) -> Iterator[Context]:
    """Flickr30k's captions: results_*.token, results.csv with `|`, or Karpathy's dataset_flickr30k.json."""
    captions: dict[str, list[str]] = {}
    for where, name, text in _flickr(file):
        image_captions = captions.setdefault(name, [])
        with bad_rows.tolerated():
            image_captions.append(_words(text, where))
    for name, texts in captions.items():
        if texts:
            yield Context(f"flickr30k/{Path(name).stem}", name, tuple(texts))
    if not captions:
        raise InputError(f"'{file}' holds no captions; give Flickr30k's own file")


def _flickr(file: Path) -> Iterator[tuple[str, str, str]]:
    if first_byte(file) == "{":
        for image in items(file, "images"):
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
        boxes, sides = [], (value.get("width", 1), value.get("height", 1))
        with bad_rows.tolerated():
            if any(not caption.strip() for caption in captions):
                raise BadAnnotation(f"{where}: a caption is empty; remove it")
        if not _are_numbers(sides):
            raise InputError(f"{where}: width and height are {sides[0]!r} and {sides[1]!r}; write numbers")
        for entry in value.get("boxes") or ():
            with bad_rows.tolerated():
                boxes.append(_plain_box(entry, sides[0], sides[1], where))
        texts = [" ".join(caption.split()) for caption in captions if caption.strip()]
        text = str(value.get("text") or "").strip()
        with bad_rows.tolerated():
            if not texts and not boxes and not text:
                raise BadAnnotation(
                    f"{where}: picture '{image}' has neither captions nor boxes nor text; add some"
                )
            key = str(value.get("id") or Path(image).with_suffix(""))
            yield Context(key, image, tuple(texts), tuple(boxes), text)


def _plain_box(entry: Any, width: float, height: float, where: str) -> AnnotatedBox:
    category = entry.get("category") if isinstance(entry, dict) else None
    if not isinstance(category, str) or not category.strip():
        raise BadAnnotation(f"{where}: the box {entry!r} has no category; write one")
    if not isinstance(box := entry.get("box"), list):
        raise BadAnnotation(
            f"{where}: the box of '{category}' is {box!r}; write 'box': left, top, right, bottom"
        )
    try:
        return AnnotatedBox(category.strip(), normalised(box, width, height, where))
    except BadAnnotation as error:
        if (width, height) != (1, 1):
            raise
        raise BadAnnotation(f"{error}; a box in pixels needs 'width' and 'height' in its line") from error


def gather(
    sources: Iterable[Iterable[Context]], finder: ImageFinder | None, bad_rows: BadRows, limit: int | None
) -> list[Context]:
    """The contexts of all sources, up to `limit`, each with its picture in `finder`'s folders.

    Raises InputError on two contexts of one id, on none at all, and beyond what `spoiled` allows.
    """
    kept: dict[str, Context] = {}
    with official(lambda: f"what stands behind the annotations of {counted(len(kept), 'picture')}"):
        for context in itertools.chain.from_iterable(sources):
            if limit is not None and len(kept) >= limit:
                break
            if context.id in kept:
                raise InputError(f"two pictures have the id '{context.id}'; give each its own")
            with bad_rows.tolerated():
                try:
                    if finder is not None:
                        finder.find(context.image)
                except InputError as error:
                    raise BadAnnotation(str(error)) from error
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
