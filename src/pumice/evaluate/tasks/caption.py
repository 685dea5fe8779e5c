"""Captions: COCO, Flickr8k, Flickr30k by Karpathy's splits (arXiv 1412.2306), nocaps (arXiv 1812.08658)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pumice.errors import InputError
from pumice.evaluate.files import Pictures, locate, need, read_json, write_json
from pumice.evaluate.metrics.captions import bleu, java_metrics, rouge_l
from pumice.evaluate.metrics.cider import Cider
from pumice.evaluate.task import Answered, Cell, Floats, Question, Score, Source, Task

PROMPT = "Provide a one-sentence caption for the provided image."
SPICE = "PUMICE_SPICE"  # environment: 1 computes SPICE too, whose Java program fetches large models


def caption_score(answered: Sequence[Answered], key: str = "category") -> Score:
    """All caption metrics times 100. The headline is CIDEr-D, over the document frequencies of this set."""
    said = [" ".join(text.split()) for _, text in answered]
    truths = [question.meta["answers"] for question, _ in answered]
    cider = Cider(truths).score(said)
    rouge = [rouge_l(text, captions) for text, captions in zip(said, truths, strict=True)]
    metrics = {"CIDEr": 100 * float(np.mean(cider))}
    metrics |= {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu(said, truths), 1)}
    metrics["ROUGE-L"] = 100 * float(np.mean(rouge))
    more, notes = java_metrics(said, truths, spice=os.environ.get(SPICE) == "1")
    parts: dict[str, dict[str, Cell]] = {}
    names = [question.meta.get(key) for question, _ in answered]
    for name in dict.fromkeys(name for name in names if name is not None):
        chosen = [value for value, other in zip(cider, names, strict=True) if other == name]
        parts.setdefault("domain", {})[str(name)] = Cell(100 * sum(chosen) / len(chosen), len(chosen))
    if len(answered) == 1:
        notes.append("one picture alone always has a CIDEr of 0")

    each = np.array(cider)

    def statistic(weights: Floats) -> float:
        return 100 * float((weights * each).sum() / weights.sum())

    values: list[float | None] = [min(1.0, value / 10) for value in cider]
    return Score(metrics | more, parts, values, statistic, notes)


class Karpathy(Task):
    """Pictures and captions of one of Karpathy's files; its subclasses say which."""

    headline = "CIDEr"
    unit = "points"
    splits = ("test", "val")
    max_new_tokens = 64
    file: str
    folders: tuple[str, ...]

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(data, (self.file,), self.source.files)
        found = read_json(file)
        need(found, ("images",), f"'{file}'")
        pictures = Pictures(data, *self.folders)
        for number, row in enumerate(found["images"], 1):
            need(row, ("filename", "split", "sentences"), f"'{file}', image {number}")
            if row["split"] != self.split:
                continue
            name = row["filename"]
            inside = f"{row['filepath']}/{name}" if row.get("filepath") else name
            meta = {"question": PROMPT, "answers": [sentence["raw"] for sentence in row["sentences"]]}
            key = str(row.get("cocoid", name))
            also = name if key != name else str(row.get("imgid", ""))
            yield Question(key, (pictures.get(inside, name),), PROMPT, meta, also)

    def score(self, answered: Sequence[Answered]) -> Score:
        return caption_score(answered)

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """COCO's result format."""
        rows = [
            {"image_id": int(q.id) if q.id.isdecimal() else q.id, "caption": " ".join(text.split())}
            for q, text in answered
        ]
        write_json(path, rows)


_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/"


class CocoCaptions(Karpathy):
    name = "coco-caption"
    title = "COCO captions"
    rank = 30
    file = "dataset_coco.json"
    folders = ("", "images")
    source = Source(
        url=_URL,
        version="dataset_coco.json",
        licence="captions CC BY 4.0; pictures under COCO's terms",
        layout=("dataset_coco.json (in caption_datasets.zip or coco.zip)", "val2014/"),
        sizes={"test": 5000, "val": 5000},
    )


class Flickr8k(Karpathy):
    name = "flickr8k"
    title = "Flickr8k captions"
    rank = 31
    file = "dataset_flickr8k.json"
    folders = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
    source = Source(
        url=_URL,
        version="dataset_flickr8k.json",
        licence="for research; pictures under Flickr's terms",
        layout=("dataset_flickr8k.json", "Flicker8k_Dataset/"),
        sizes={"test": 1000, "val": 1000},
    )


class Flickr30k(Karpathy):
    name = "flickr30k"
    title = "Flickr30k captions"
    rank = 32
    file = "dataset_flickr30k.json"
    folders = ("flickr30k-images", "flickr30k_images", "images")
    source = Source(
        url=_URL,
        version="dataset_flickr30k.json",
        licence="for research; pictures under Flickr's terms",
        layout=("dataset_flickr30k.json", "flickr30k-images/"),
        sizes={"test": 1000, "val": 1014},
    )


class Nocaps(Task):
    """Objects that COCO's captions never name. CIDEr in all, and per domain over the same frequencies."""

    name = "nocaps"
    title = "nocaps"
    headline = "CIDEr"
    unit = "points"
    rank = 33
    splits = ("val", "test")
    max_new_tokens = 64
    source = Source(
        url="https://nocaps.org/download",
        version="nocaps_val_4500_captions.json",
        licence="annotations CC BY 2.0; pictures under Open Images' terms",
        layout=("nocaps_val_4500_captions.json", "images/"),
        sizes={"val": 4500, "test": 10600},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        names = (
            ("nocaps_val_4500_captions.json",) if self.split == "val" else ("nocaps_test_image_info.json",)
        )
        file = locate(data, names, self.source.files)
        found = read_json(file)
        need(found, ("images",), f"'{file}'")
        captions: dict[int, list[str]] = {}
        for row in found.get("annotations", ()):
            captions.setdefault(row["image_id"], []).append(row["caption"])
        pictures = Pictures(data, "images", self.split)
        for number, row in enumerate(found["images"], 1):
            need(row, ("id", "file_name"), f"'{file}', image {number}")
            meta = {"question": PROMPT, "answers": captions.get(row["id"], []), "category": row.get("domain")}
            yield Question(str(row["id"]), (pictures.get(row["file_name"]),), PROMPT, meta, row["file_name"])

    def score(self, answered: Sequence[Answered]) -> Score:
        if self.split == "test":
            raise InputError(
                "the captions of nocaps test are not public; write --submission FILE and upload it to "
                "EvalAI, or score --split val"
            )
        return caption_score(answered)

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        rows = [
            {"image_id": int(question.id), "caption": " ".join(text.split())} for question, text in answered
        ]
        write_json(path, rows)
