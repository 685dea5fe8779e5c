"""Captions: COCO, Flickr8k, Flickr30k (Karpathy's splits, arXiv 1412.2306), nocaps (arXiv 1812.08658)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pumice.evaluate.files import ImageFolders, read_json, read_rows, write_json
from pumice.evaluate.metrics.captions import bleu, java_metrics, rouge_l
from pumice.evaluate.metrics.cider import Cider
from pumice.evaluate.task import Answered, Question, Score, Task, mean_statistic, scores_by_category

PROMPT = "Provide a one-sentence caption for the provided image."
# An environment variable: 1 also computes SPICE, whose Java program downloads large models.
SPICE = "PUMICE_SPICE"


def caption_score(answered: Sequence[Answered]) -> Score:
    """Return all caption metrics times 100; the headline is CIDEr-D with document frequencies of this set."""
    # 1. Compute the metrics of the corpus.
    captions = [" ".join(text.split()) for _, text in answered]
    truths = [question.meta["answers"] for question, _ in answered]
    cider = Cider(truths).score(captions)
    rouge = [rouge_l(text, references) for text, references in zip(captions, truths, strict=True)]
    metrics = {"CIDEr": 100 * float(np.mean(cider))}
    metrics |= {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu(captions, truths), 1)}
    metrics["ROUGE-L"] = 100 * float(np.mean(rouge))
    java, notes = java_metrics(captions, truths, spice=os.environ.get(SPICE) == "1")
    # 2. Split CIDEr-D by category.
    domains = scores_by_category(answered, cider, "category")
    parts = {"domain": domains} if domains else {}
    if len(answered) == 1:
        notes.append("one picture alone always has a CIDEr of 0")
    values: list[float | None] = [min(1.0, value / 10) for value in cider]
    return Score(metrics | java, parts, values, mean_statistic(cider), notes)


class CaptionTask(Task):
    """A benchmark of captions; their CIDEr is the headline."""

    headline = "CIDEr"
    unit = "points"
    max_new_tokens = 64

    def score(self, answered: Sequence[Answered]) -> Score:
        return caption_score(answered)

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write COCO's result format."""
        rows = [
            {"image_id": int(q.id) if q.id.isdecimal() else q.id, "caption": " ".join(text.split())}
            for q, text in answered
        ]
        write_json(path, rows)


class Karpathy(CaptionTask):
    """Images and captions of one of Karpathy's files; a subclass names the file."""

    file: str
    folders: tuple[str, ...]

    def questions(self, data: Path) -> Iterator[Question]:
        images = ImageFolders(data, *self.folders)
        for row in self.rows(data, self.file, keys=("filename", "split", "sentences"), at="images"):
            if row["split"] != self.split:
                continue
            name = row["filename"]
            path = f"{row['filepath']}/{name}" if row.get("filepath") else name
            meta = {"question": PROMPT, "answers": [sentence["raw"] for sentence in row["sentences"]]}
            key = str(row.get("cocoid", name))
            llava_id = name if key != name else str(row.get("imgid", ""))
            yield Question(key, (images.get(path, name),), PROMPT, meta, llava_id)


class CocoCaptions(Karpathy):
    name = "coco-caption"
    title = "COCO captions"
    file = "dataset_coco.json"
    folders = ("", "images")


class Flickr8k(Karpathy):
    name = "flickr8k"
    title = "Flickr8k captions"
    file = "dataset_flickr8k.json"
    folders = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")


class Flickr30k(Karpathy):
    name = "flickr30k"
    title = "Flickr30k captions"
    file = "dataset_flickr30k.json"
    folders = ("flickr30k-images", "flickr30k_images", "images")


class Nocaps(CaptionTask):
    """Captions of objects that COCO's captions never name. Headline: CIDEr; it is also split by domain."""

    name = "nocaps"
    title = "nocaps"

    def questions(self, data: Path) -> Iterator[Question]:
        name = "nocaps_val_4500_captions" if self.split == "val" else "nocaps_test_image_info"
        file = self.locate(data, f"{name}.json")
        captions: dict[int, list[str]] = {}
        for row in read_json(file, "images").get("annotations", ()):
            captions.setdefault(row["image_id"], []).append(row["caption"])
        images = ImageFolders(data, "images", self.split)
        for row in read_rows(file, "id", "file_name", at="images"):
            meta = {"question": PROMPT, "answers": captions.get(row["id"], []), "category": row.get("domain")}
            yield Question(str(row["id"]), (images.get(row["file_name"]),), PROMPT, meta, row["file_name"])

    def score(self, answered: Sequence[Answered]) -> Score:
        if self.split == "test":
            raise self.not_public("EvalAI")
        return super().score(answered)
