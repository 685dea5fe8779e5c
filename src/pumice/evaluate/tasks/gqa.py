"""GQA (arXiv 1902.09506): compositional questions about scene graphs.

A row of its files:

    "20123": {"imageId": "n161313", "question": "Is it cloudy?", "answer": "yes",
     "types": {"structural": "verify", ...}, ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.errors import InputError
from pumice.evaluate.files import ImageFolders, read_rows, write_json
from pumice.evaluate.task import SHORT, Answered, Question, Score, Task, mean_score


def prediction(text: str) -> str:
    """Normalise an answer as LLaVA's convert_gqa_for_eval.py does."""
    return text.rstrip(".").lower()


class GQA(Task):
    """An answer is right if it equals the truth, as in the benchmark's eval.py."""

    name = "gqa"
    title = "GQA"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        file = self.locate(data, f"{self.split}_questions.json", f"llava_gqa_{self.split}.jsonl")
        images = ImageFolders(data, "images", "data/images", "allImages/images")
        if file.name.endswith(".jsonl"):  # LLaVA's list has no truths; it serves submissions
            for row in read_rows(file, "question_id", "image", "text"):
                yield Question(str(row["question_id"]), (images.get(row["image"]),), row["text"])
            return
        for row in read_rows(file, "imageId", "question", "answer", at="*"):
            types = row.get("types") or {}
            structure = types.get("structural")
            meta = {
                "question": row["question"],
                "answer": row["answer"],
                "category": None if structure is None else "open" if structure == "query" else "binary",
                "structure": structure,
                "semantic": types.get("semantic"),
            }
            image = images.get(f"{row['imageId']}.jpg")
            yield Question(row["key"], (image,), f"{row['question']}\n{SHORT}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        if any("answer" not in question.meta for question, _ in answered):
            raise InputError(
                f"LLaVA's list of GQA holds no answers; put {self.split}_questions.json beside it, or write "
                "--submission FILE"
            )
        values = [float(prediction(text) == question.meta.get("answer")) for question, text in answered]
        categories = {"answer": "category", "structure": "structure", "semantics": "semantic"}
        return mean_score(answered, {"accuracy": values}, categories)

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        rows = [{"questionId": question.id, "prediction": prediction(text)} for question, text in answered]
        write_json(path, rows)
