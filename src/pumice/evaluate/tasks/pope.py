"""POPE (arXiv 2305.10355): yes/no questions whether an object is in the image.

A row of its files:

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
     "text": "Is there a snowboard in the image?", "label": "yes"}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.errors import InputError, counted
from pumice.evaluate.files import DataFile, ImageFolders, read_rows, search
from pumice.evaluate.metrics.presence import is_unclear, means_yes, presence_score
from pumice.evaluate.task import SHORT, Answered, CategoryScore, Floats, Question, Score, Task

KINDS = ("adversarial", "popular", "random")


class Pope(Task):
    """Headline: the mean F1 of the three kinds of sampling; "yes" is the positive class.

    Labels are matched to answers by question; the original matches them by position.
    """

    name = "pope"
    title = "POPE"
    headline = "f1"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        files = {kind: self.locate(data, f"coco_pope_{kind}.json") for kind in KINDS}
        llava_list = search(data, ("llava_pope_test.jsonl",))
        images = ImageFolders(data, "val2014", "images/val2014")
        for kind, file in files.items():
            rows = list(read_rows(file, "question_id", "image", "text", "label"))
            ids = [f"{kind}/{row['question_id']}" for row in rows]
            other_ids = [str(row["question_id"]) for row in rows]
            if llava_list is not None:
                ids, other_ids = _llava_ids(llava_list, kind, rows), ids
            for row, key, other in zip(rows, ids, other_ids, strict=True):
                meta = {
                    "question": row["text"],
                    "answer": row["label"],
                    "category": kind,
                    "group": row["image"],
                }
                yield Question(key, (images.get(row["image"]),), f"{row['text']}\n{SHORT}", meta, other)

    def score(self, answered: Sequence[Answered]) -> Score:
        # 1. Read every answer as yes or no.
        predicted = np.array([means_yes(text) for _, text in answered])
        truth = np.array([question.meta["answer"] != "no" for question, _ in answered])
        kinds = np.array([question.meta["category"] for question, _ in answered])
        present = [kind for kind in KINDS if (kinds == kind).any()]

        def scores(kind: str, weights: Floats) -> dict[str, float]:
            return presence_score(predicted, truth, weights * (kinds == kind))

        def f1(weights: Floats) -> float:
            return 100 * float(np.mean([scores(kind, weights)["f1"] for kind in present]))

        # 2. Score each kind of sampling.
        cells: dict[str, dict[str, CategoryScore]] = {"f1": {}, "accuracy": {}, "yes rate": {}}
        ones = np.ones(len(answered))
        metrics = {"f1": f1(ones)}
        for kind in present:
            part = scores(kind, ones)
            for title, by_kind in cells.items():
                by_kind[kind] = CategoryScore(100 * part[title], int((kinds == kind).sum()))
            for name in ("precision", "recall"):
                metrics[f"{name}_{kind}"] = 100 * part[name]
        for title, name in (("accuracy", "accuracy"), ("yes rate", "yes_rate")):
            metrics[name] = float(np.mean([cell.value for cell in cells[title].values()]))
        # 3. Note what differs from a full run of the original.
        notes = []
        if len(present) < len(KINDS):
            notes.append(f"only {', '.join(present)} of {len(KINDS)} kinds of questions are answered")
        if not predicted.any():
            notes.append("every answer says no; F1 is 0 where the original divides by zero")
        if unclear := sum(is_unclear(text) for _, text in answered):
            notes.append(
                f"{counted(unclear, 'answer', 'hold')} neither yes nor no, which counts as yes, as in the "
                "original"
            )
        return Score(metrics, cells, [float(v) for v in predicted == truth], statistic=f1, notes=notes)


def _llava_ids(file: DataFile, kind: str, labelled: Sequence[dict[str, Any]]) -> list[str]:
    """Return the ids of LLaVA's list, whose questions have the order of the labels."""
    rows = [row for row in read_rows(file, "question_id") if row.get("category") == kind]
    labels_file = f"coco_pope_{kind}.json"
    remedy = "take both from one version, or remove LLaVA's list"
    if len(rows) != len(labelled):
        raise InputError(
            f"'{file}' lists {counted(len(rows), f'{kind} question')} where {labels_file} has "
            f"{len(labelled)}; {remedy}"
        )
    for number, (row, label) in enumerate(zip(rows, labelled, strict=True), 1):
        if row.get("image") != label.get("image"):
            raise InputError(
                f"{kind} question {number} is about {row.get('image')!r} in '{file}' and about "
                f"{label.get('image')!r} in {labels_file}; {remedy}"
            )
    return [str(row["question_id"]) for row in rows]
