"""RefCOCO, RefCOCO+ (arXiv 1608.00272) and RefCOCOg (arXiv 1511.02283): the box of what a sentence describes.

refs(unc).p, refs(umd).p or refs(google).p is a pickle of plain data, a list of

    {"ref_id": 1, "ann_id": 2, "image_id": 3, "split": "val", "sentences": [{"sent_id": 4, "sent": "a dog"}]}

and instances.json beside it has COCO's annotations with these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pumice.boxes import Box
from pumice.data.objects import WHERE
from pumice.errors import InputError, official
from pumice.evaluate.files import DataFile, ImageFolders, read_json, require_keys
from pumice.evaluate.metrics.boxes import best_iou, is_right
from pumice.evaluate.task import Answered, Question, Score, Task, add_unread, mean_score
from pumice.storage.plain_pickle import read_plain_pickle

FOLDERS = ("train2014", "images/train2014", "images/mscoco/images/train2014")


class RefCoco(Task):
    """Headline: the share of sentences whose box has an IoU of at least 0.5 (Acc@0.5)."""

    name = "refcoco"
    title = "RefCOCO"
    has_boxes = True
    max_new_tokens = 64
    splits: ClassVar[tuple[str, ...]] = (
        "val", "testA", "testB", "train", "google-val", "google-test", "google-train",
    )  # fmt: skip
    splitter: ClassVar[str] = "unc"  # who made the splits without a name before them

    def questions(self, data: Path) -> Iterator[Question]:
        # 1. The files of one folder belong together.
        maker, _, split = self.split.rpartition("-")
        name = f"refs({maker or self.splitter}).p"
        file = self.locate(data, f"{self.name}/{name}", name)
        refs = read_plain_pickle(file.read(), str(file))
        beside = f"{self.name}/instances.json"
        instances = self.locate(data, beside, "instances.json") if file.member else _beside(file)
        values = read_json(instances, "images", "annotations")
        with official(lambda: f"'{instances}', images with id, annotations with id and bbox"):
            boxes = {note["id"]: note["bbox"] for note in values["annotations"]}
            pictures = {image["id"]: image for image in values["images"]}
        images = ImageFolders(data, *FOLDERS)
        if not isinstance(refs, list):
            raise InputError(f"'{file}' holds no list of refs; is this the official file?")

        def where() -> str:
            return f"'{file}', ref {number}, its sentences, picture and box"

        # 2. A question for each sentence about a thing.
        for number, ref in enumerate(refs, 1):
            require_keys(
                ref, ("ref_id", "ann_id", "image_id", "split", "sentences"), f"'{file}', ref {number}"
            )
            if ref["split"] != split:
                continue
            with official(where):
                picture, corners = pictures.get(ref["image_id"]), boxes.get(ref["ann_id"])
                if picture is None or corners is None:
                    raise InputError(
                        f"'{file}': ref {ref['ref_id']} names picture {ref['image_id']} and annotation "
                        f"{ref['ann_id']}, which '{instances}' does not have; give the one beside it"
                    )
                asked = _questions(ref, picture, corners, images)
            yield from asked

    def score(self, answered: Sequence[Answered]) -> Score:
        ious = [
            best_iou(text, self.box_map(question.meta["size"]), [question.meta["truth"]])
            for question, text in answered
        ]
        metrics = {"accuracy": [is_right(iou) for iou in ious], "mean_iou": [iou or 0.0 for iou in ious]}
        score = mean_score(answered, metrics, notes=[self.box_note()])
        add_unread(score, ious.count(None), "hold no box, which counts as wrong")
        return score


class RefCocoPlus(RefCoco):
    """Sentences without words of place."""

    name = "refcoco+"
    title = "RefCOCO+"
    splits = ("val", "testA", "testB", "train")


class RefCocoG(RefCoco):
    """Longer sentences; the splits of umd share no picture, those of google do."""

    name = "refcocog"
    title = "RefCOCOg"
    splits = ("val", "test", "train", "google-val", "google-train")
    splitter = "umd"


def _questions(
    ref: dict[str, Any], picture: dict[str, Any], corners: Sequence[float], images: ImageFolders
) -> list[Question]:
    """Return a question for each sentence about a thing. corners: left, top, width, height in pixels."""
    left, top, width, height = corners
    truth = Box(left, top, left + width, top + height)
    if not all(map(math.isfinite, truth.corners)):
        raise ValueError(f"the box {corners} is not four finite numbers")
    questions = []
    for sentence in ref["sentences"]:
        meta = {
            "question": sentence["sent"],
            "answer": f"[{', '.join(f'{n:.2f}' for n in truth.corners)}] pixels",
            "group": picture["file_name"],
            "truth": truth,
            "size": (int(picture["width"]), int(picture["height"])),
        }
        image = images.get(picture["file_name"])
        questions.append(Question(str(sentence["sent_id"]), (image,), WHERE + sentence["sent"], meta))
    return questions


def _beside(file: DataFile) -> DataFile:
    path = file.path.with_name("instances.json")
    if not path.is_file():
        raise InputError(f"'{path}' is missing; put the instances.json of '{file}' beside it")
    return DataFile(path)
