"""CLEVR (arXiv 1612.06890): questions about rendered scenes, each with a program that names the skill.

A row of its files:

    {"image_filename": "CLEVR_val_000000.png", "question": "What size is it?", "answer": "large",
     "program": [...], ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pumice.evaluate.files import ImageFolders
from pumice.evaluate.metrics.vqa import lower_without_period, normalize_m4c
from pumice.evaluate.task import SHORT, Answered, Question, Score, Task, mean_score

_KINDS = {
    "count": "count",
    "exist": "exist",
    "equal_integer": "compare integer",
    "less_than": "compare integer",
    "greater_than": "compare integer",
}


def kind_of(program: Sequence[dict[str, Any]]) -> str | None:
    """Return one of the paper's five kinds of questions, by the last function of the program."""
    if not program:
        return None
    last = str(program[-1].get("function", program[-1].get("type")))
    if last in _KINDS:
        return _KINDS[last]
    return last.partition("_")[0].replace("equal", "compare attribute").replace("query", "query attribute")


class Clevr(Task):
    """An answer is right if it equals the truth; case and a final full stop do not count."""

    name = "clevr"
    title = "CLEVR"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        images = ImageFolders(data, f"images/{self.split}", f"CLEVR_v1.0/images/{self.split}", self.split)
        file, keys = f"CLEVR_{self.split}_questions.json", ("question", "image_filename")
        for number, row in enumerate(self.rows(data, file, keys=keys, at="questions")):
            meta = {
                "question": row["question"],
                "answer": row.get("answer"),
                "category": kind_of(row.get("program") or ()),
                "family": row.get("question_family_index"),
            }
            image = images.get(row["image_filename"])
            key = str(row.get("question_index", number))
            yield Question(key, (image,), f"{row['question']}\n{SHORT}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        if answered and all(question.meta["answer"] is None for question, _ in answered):
            raise self.not_public()
        pairs = [(text, str(question.meta["answer"])) for question, text in answered]
        values = [float(lower_without_period(text) == truth) for text, truth in pairs]
        loose = [float(normalize_m4c(text) == normalize_m4c(truth)) for text, truth in pairs]
        metrics = {"accuracy": values, "accuracy_number_words": loose}
        return mean_score(answered, metrics, {"kind": "category", "family": "family"})
