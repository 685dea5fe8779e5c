"""Rows as COCO's captions and instances, and as VQA v2's questions with annotations."""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pumice.data.sources.json_text import JsonReader, read_values
from pumice.data.sources.source import OpenFiles, Record, Source, reading
from pumice.errors import InputError

# Lists that only these files have, at the top of their object.
LISTS = ("images", "annotations", "questions", "categories")
_LICENSES = "licenses"  # which says nothing of the file, and comes first in some


class _Lists:
    """The lists of one file: where each of their items lies, and the values of those that are small."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.subset = ""  # VQA's name of COCO's part, "train2014"
        self.images: dict[Any, Any] = {}  # id -> file_name
        self.categories: dict[Any, str] = {}
        keys: dict[str, array[int]] = {"annotations": array("q"), "questions": array("q")}
        spans: dict[str, array[int]] = {"annotations": array("q"), "questions": array("q")}
        self.has_captions = False
        with reading(path), path.open("rb") as file:
            for name, value in JsonReader(file).sections(str(path)):
                if name == "data_subtype":
                    self.subset = str(value)
                elif not hasattr(value, "__next__"):
                    continue
                else:
                    for start, end, item in value:
                        if isinstance(item, dict) and item.get("iscrowd"):
                            continue  # its box is around many things
                        if name in spans:
                            spans[name].extend((start, end))
                            keys[name].extend(self._keys_of(item))
                        elif isinstance(item, dict):
                            self._add(name, item)
        # Of each item of a list: where it begins and ends; and its question_id and image_id, -1 without.
        self.spans = {name: np.array(found, np.int64).reshape(-1, 2) for name, found in spans.items()}
        self.keys = {name: np.array(found, np.int64).reshape(-1, 2) for name, found in keys.items()}

    def _keys_of(self, item: Any) -> tuple[int, int]:
        if not isinstance(item, dict):
            return -1, -1
        self.has_captions = self.has_captions or "caption" in item
        question, image = item.get("question_id"), item.get("image_id")
        return question if isinstance(question, int) else -1, image if isinstance(image, int) else -1

    def _add(self, name: str, item: dict[str, Any]) -> None:
        if name == "images":
            self.images[item.get("id")] = item.get("file_name")
        elif name == "categories":
            self.categories[item.get("id")] = str(item.get("name"))


class CocoRows(Source):
    """COCO's captions, a row each, or its instances, a row for each picture: names and boxes."""

    def __init__(self, path: Path, lists: _Lists) -> None:
        self.label, self.files, self._lists = str(path), [path], lists
        self._file = OpenFiles([path])
        self.form = "COCO captions" if lists.has_captions else "COCO instances"
        images = lists.keys["annotations"][:, 1]
        # A row's annotations: one caption, or all boxes of a picture, in the order of the file.
        order = np.arange(len(images)) if lists.has_captions else np.argsort(images, kind="stable")
        self._order = order
        new = (
            np.ones(len(order), bool) if lists.has_captions else np.diff(images[order], prepend=-(2**62)) != 0
        )
        self._first = np.append(np.flatnonzero(new), len(order))

    def __len__(self) -> int:
        return len(self._first) - 1

    def record(self, index: int) -> Record:
        numbers = self._order[self._first[index] : self._first[index + 1]].tolist()
        notes = [read_values(self._file, 0, self._lists.spans["annotations"][number]) for number in numbers]
        key = notes[0].get("image_id")
        image = self._lists.images.get(key)
        if not isinstance(image, str):
            raise InputError(
                f"{self.place(index)}: picture {key} is not in the file's list 'images'; remove it"
            )
        record: Record = {"image": image}
        if self._lists.has_captions:
            return {"id": notes[0].get("id"), **record, "caption": notes[0].get("caption")}
        names = [self._lists.categories.get(note.get("category_id"), "object") for note in notes]
        return {
            "id": key,
            **record,
            "objects": {"ref": names, "bbox": [_corners(note) for note in notes], "bbox_type": "real"},
        }


def _corners(note: dict[str, Any]) -> Any:
    """Return an annotation's box as left, top, right, bottom; None without one."""
    if note.get("bbox") is None:
        return None
    try:
        left, top, width, height = note["bbox"]
        return [left, top, left + width, top + height]
    except (TypeError, ValueError):
        return note["bbox"]  # what is wrong with it is told with the row


class VqaRows(Source):
    """VQA v2's questions, each with the answer that most people gave."""

    form = "VQA questions and annotations"

    def __init__(self, questions: _Lists, annotations: _Lists) -> None:
        """Raises InputError when a question has no annotation."""
        self.label, self.files = str(questions.path), [questions.path, annotations.path]
        self._file = OpenFiles(self.files)
        self._subset = questions.subset or annotations.subset
        self._questions, self._answers = questions.spans["questions"], annotations.spans["annotations"]
        keys, answer_keys = questions.keys["questions"][:, 0], annotations.keys["annotations"][:, 0]
        order = np.argsort(answer_keys, kind="stable")
        found = np.searchsorted(answer_keys[order], keys)
        matches = np.isin(keys, answer_keys)
        if not matches.all():
            raise InputError(
                f"'{questions.path}': question {keys[~matches][0]} has no answer in '{annotations.path}'; "
                "give both files of one split"
            )
        self._answer_of = order[found]

    def __len__(self) -> int:
        return len(self._questions)

    def record(self, index: int) -> Record:
        question = read_values(self._file, 0, self._questions[index])
        note = read_values(self._file, 1, self._answers[int(self._answer_of[index])])
        number = question.get("image_id")
        image = number
        if isinstance(number, int):
            image = f"COCO_{self._subset}_{number:012d}.jpg" if self._subset else f"{number:012d}.jpg"
        return {
            "id": question.get("question_id"),
            "image": image,
            "question": question.get("question"),
            "answer": most_given(note),
        }


def most_given(note: dict[str, Any]) -> Any:
    """Return the answer of VQA's annotation that most people gave."""
    answer = note.get("multiple_choice_answer")
    if answer is None:
        counted = Counter(str(a["answer"]) for a in note.get("answers") or ()).most_common(1)
        answer = counted[0][0] if counted else ""
    return answer


def lists_in(path: Path) -> set[str]:
    """Return which of `LISTS` a file has at the top of its object, reading no further than needed."""
    found: set[str] = set()
    with path.open("rb") as file, contextlib.suppress(InputError):  # a row that is cut off is told later
        for name, value in JsonReader(file).sections(str(path)):
            if not hasattr(value, "__next__"):
                continue
            first = next(value, None)
            if first is not None and name != _LICENSES and not (name in LISTS and _fits(name, first[2])):
                return found
            if name in LISTS:
                found.add(name)
            # These two tell what the file is. What comes before them may be long, and must be read.
            if name in ("annotations", "questions"):
                return found
            for _ in value:
                continue
    return found


def _fits(name: str, item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    keys = {"images": "file_name", "annotations": "image_id", "questions": "question_id", "categories": "id"}
    return keys[name] in item


def open_lists(path: Path) -> Source:
    """Return the rows of a COCO or VQA file. Of VQA's two files the other one lies in the same folder."""
    lists = _Lists(path)
    if len(lists.keys["questions"]):
        return VqaRows(lists, _partner(lists, "annotations"))
    if not lists.images and not lists.has_captions and (lists.keys["annotations"][:, 0] >= 0).any():
        return VqaRows(_partner(lists, "questions"), lists)
    if not len(lists.spans["annotations"]):
        raise InputError(f"'{path}' holds no annotations; give the file of captions, instances or questions")
    return CocoRows(path, lists)


def _partner(lists: _Lists, name: str) -> _Lists:
    """Return the file in the same folder that has the list `name`, of the same part of COCO."""
    if name == "annotations" and len(lists.spans[name]):
        return lists
    for path in sorted(lists.path.parent.glob("*.json")):
        if path != lists.path and name in lists_in(path):
            other = _Lists(path)
            if not (other.subset and lists.subset and other.subset != lists.subset):
                return other
    have, lack = ("questions", "annotations") if name == "annotations" else ("annotations", "questions")
    raise InputError(
        f"'{lists.path}' holds VQA's {have}, but no file beside it its {lack}; put both in one folder"
    )
