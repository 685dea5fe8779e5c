"""MMStar (arXiv 2403.20330): choices that cannot be answered without the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.evaluate.files import OPTION_COLUMNS, base64_image, bytes_image, hidden_options, options
from pumice.evaluate.metrics.choice import mmstar_right
from pumice.evaluate.task import LETTER, Answered, Question, Score, Task, add_unread, mean_score, options_note


class MMStar(Task):
    """An answer is right if the letter comes first, as in the benchmark's mmstar.py."""

    name = "mmstar"
    title = "MMStar"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        names = ("mmstar.parquet", "MMStar.parquet", "MMStar.tsv", "mmstar.tsv")
        keys = ("index", "question", "answer", "image")
        for row in self.rows(data, *names, keys=keys, texts=("question", *OPTION_COLUMNS)):
            key, image = str(row["index"]), row["image"]
            image_data = image.get("bytes") if isinstance(image, dict) else image
            image_file = (
                bytes_image(key, image_data)
                if isinstance(image_data, bytes)
                else base64_image(key, str(image_data))
            )
            text = str(row["question"])
            choices = [f"{letter}: {option}" for letter, option in options(row).items()]
            if choices and "Options:" not in text:
                text = f"{text}\nOptions: {', '.join(choices)}"
            meta = {
                "question": row["question"],
                "answer": str(row["answer"]),
                "category": row.get("category"),
                "part": row.get("l2_category"),
                "bench": row.get("bench"),
                "hidden": hidden_options(row),
            }
            yield Question(key, (image_file,), f"{text}\n{LETTER}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        values = [float(mmstar_right(text, question.meta["answer"])) for question, text in answered]
        unread = sum(not any(mmstar_right(text, letter) for letter in OPTION_COLUMNS) for _, text in answered)
        categories = {"ability": "category", "part": "part"}
        score = mean_score(answered, {"accuracy": values}, categories, options_note(answered))
        add_unread(score, unread, "begin with no option's letter, which counts as wrong")
        return score
