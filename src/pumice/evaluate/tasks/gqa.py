"""GQA (arXiv 1902.09506): compositional questions about scene graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.errors import InputError
from pumice.evaluate.files import ImageFolders, locate, read_jsonl, read_object, require_keys, write_json
from pumice.evaluate.task import (
    SHORT,
    Answered,
    DatasetSource,
    Question,
    Score,
    Task,
    mean_percent,
    scores_by_category,
)


def prediction(text: str) -> str:
    """Normalise an answer as LLaVA's convert_gqa_for_eval.py does."""
    return text.rstrip(".").lower()


class GQA(Task):
    """An answer is right if it equals the truth, as in the benchmark's eval.py."""

    name = "gqa"
    title = "GQA"
    headline = "accuracy"
    rank = 2
    splits = ("testdev_balanced", "val_balanced")
    max_new_tokens = 16
    source = DatasetSource(
        url="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        version="questions 1.2",
        licence="CC BY 4.0",
        layout=("testdev_balanced_questions.json (in questions1.2.zip)", "images/"),
        sizes={"testdev_balanced": 12578, "val_balanced": 132062},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        names = (f"{self.split}_questions.json", f"llava_gqa_{self.split}.jsonl")
        file = locate(data, names, self.source.expected_files)
        images = ImageFolders(data, "images", "data/images", "allImages/images")
        if file.name.endswith(".jsonl"):  # LLaVA's list has no truths; it serves submissions
            for number, row in enumerate(read_jsonl(file), 1):
                require_keys(row, ("question_id", "image", "text"), f"'{file}', row {number}")
                yield Question(str(row["question_id"]), (images.get(row["image"]),), row["text"])
            return
        for key, row in read_object(file).items():
            require_keys(row, ("imageId", "question", "answer"), f"'{file}', question {key}")
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
            yield Question(key, (image,), f"{row['question']}\n{SHORT}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        if any("answer" not in question.meta for question, _ in answered):
            raise InputError(
                f"LLaVA's list of GQA holds no answers; put {self.split}_questions.json beside it, or write "
                "--submission FILE"
            )
        values = [float(prediction(text) == question.meta.get("answer")) for question, text in answered]
        return Score(
            {"accuracy": mean_percent(values)},
            {
                "answer": scores_by_category(answered, values, "category"),
                "structure": scores_by_category(answered, values, "structure"),
                "semantics": scores_by_category(answered, values, "semantic"),
            },
            list(values),
        )

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        rows = [{"questionId": question.id, "prediction": prediction(text)} for question, text in answered]
        write_json(path, rows)
