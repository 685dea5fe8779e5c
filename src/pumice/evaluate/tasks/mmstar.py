"""MMStar (arXiv 2403.20330): choices that cannot be answered without looking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pumice.evaluate.files import base64_picture, bytes_picture, locate, need, read_parquet, read_tsv
from pumice.evaluate.metrics.choice import mmstar_right
from pumice.evaluate.task import LETTER, Answered, Question, Score, Source, Task, categories, percent


class MMStar(Task):
    """Read from MMStar.tsv or mmstar.parquet; the letter must stand first, as in its mmstar.py."""

    name = "mmstar"
    title = "MMStar"
    headline = "accuracy"
    rank = 21
    splits = ("val",)
    max_new_tokens = 16
    source = Source(
        url="https://huggingface.co/datasets/Lin-Chen/MMStar",
        version="1,500 questions",
        licence="of the benchmarks it was chosen from",
        layout=("mmstar.parquet or MMStar.tsv",),
        sizes={"val": 1500},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(
            data, ("mmstar.parquet", "MMStar.parquet", "MMStar.tsv", "mmstar.tsv"), self.source.files
        )
        rows: Iterator[dict[str, Any]]
        rows = read_tsv(file) if file.name.endswith(".tsv") else read_parquet([file.path])
        for number, row in enumerate(rows, 1):
            need(row, ("index", "question", "answer", "image"), f"'{file}', row {number}")
            key, image = str(row["index"]), row["image"]
            data_of = image.get("bytes") if isinstance(image, dict) else image
            picture = (
                bytes_picture(key, data_of)
                if isinstance(data_of, bytes)
                else base64_picture(key, str(data_of))
            )
            text = str(row["question"])
            options = [f"{letter}: {row[letter]}" for letter in "ABCD" if row.get(letter) is not None]
            if options and "Options:" not in text:
                text = f"{text}\nOptions: {', '.join(options)}"
            meta = {
                "question": row["question"],
                "answer": str(row["answer"]),
                "category": row.get("category"),
                "part": row.get("l2_category"),
                "bench": row.get("bench"),
            }
            yield Question(key, (picture,), f"{text}\n{LETTER}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        values = [float(mmstar_right(text, question.meta["answer"])) for question, text in answered]
        parts = {
            "ability": categories(answered, values, "category"),
            "part": categories(answered, values, "part"),
        }
        return Score({"accuracy": percent(values)}, parts, list(values))
