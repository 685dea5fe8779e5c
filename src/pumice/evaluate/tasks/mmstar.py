"""MMStar (arXiv 2403.20330): choices that cannot be answered without the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pumice.evaluate.files import (
    base64_image,
    bytes_image,
    hidden_options,
    locate,
    read_parquet,
    read_tsv,
    require_keys,
)
from pumice.evaluate.metrics.choice import mmstar_right
from pumice.evaluate.task import (
    LETTER,
    Answered,
    DatasetSource,
    Question,
    Score,
    Task,
    mean_percent,
    options_note,
    scores_by_category,
)


class MMStar(Task):
    """An answer is right if the letter comes first, as in the benchmark's mmstar.py."""

    name = "mmstar"
    title = "MMStar"
    headline = "accuracy"
    rank = 21
    splits = ("val",)
    max_new_tokens = 16
    source = DatasetSource(
        url="https://huggingface.co/datasets/Lin-Chen/MMStar",
        version="1,500 questions",
        licence="of the benchmarks it was chosen from",
        layout=("mmstar.parquet or MMStar.tsv",),
        sizes={"val": 1500},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(
            data, ("mmstar.parquet", "MMStar.parquet", "MMStar.tsv", "mmstar.tsv"), self.source.expected_files
        )
        rows: Iterator[dict[str, Any]]
        rows = (
            read_tsv(file, ("question", *"ABCD")) if file.name.endswith(".tsv") else read_parquet([file.path])
        )
        for number, row in enumerate(rows, 1):
            require_keys(row, ("index", "question", "answer", "image"), f"'{file}', row {number}")
            key, image = str(row["index"]), row["image"]
            image_data = image.get("bytes") if isinstance(image, dict) else image
            image_file = (
                bytes_image(key, image_data)
                if isinstance(image_data, bytes)
                else base64_image(key, str(image_data))
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
                "hidden": hidden_options(row, "ABCD"),
            }
            yield Question(key, (image_file,), f"{text}\n{LETTER}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        values = [float(mmstar_right(text, question.meta["answer"])) for question, text in answered]
        parts = {
            "ability": scores_by_category(answered, values, "category"),
            "part": scores_by_category(answered, values, "part"),
        }
        unread = sum(not any(mmstar_right(text, letter) for letter in "ABCD") for _, text in answered)
        notes = [f"{unread} answers begin with no option's letter and count as wrong"] if unread else []
        notes += options_note(answered)
        metrics = {"accuracy": mean_percent(values), "unread": float(unread)}
        return Score(metrics, parts, list(values), notes=notes)
