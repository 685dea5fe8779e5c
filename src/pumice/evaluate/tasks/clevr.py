"""CLEVR (arXiv 1612.06890): rendered scenes, and questions whose programs say which skill they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pumice.errors import InputError
from pumice.evaluate.files import Pictures, locate, need, read_object
from pumice.evaluate.metrics.vqa import bare, m4c
from pumice.evaluate.task import SHORT, Answered, Question, Score, Source, Task, categories, percent

_KINDS = {
    "count": "count",
    "exist": "exist",
    "equal_integer": "compare integer",
    "less_than": "compare integer",
    "greater_than": "compare integer",
}


def kind_of(program: Sequence[dict[str, Any]]) -> str | None:
    """The paper's five kinds of questions, by the last function of the program."""
    if not program:
        return None
    last = str(program[-1].get("function", program[-1].get("type")))
    if last in _KINDS:
        return _KINDS[last]
    return last.partition("_")[0].replace("equal", "compare attribute").replace("query", "query attribute")


class Clevr(Task):
    """The whole answer must be the one of the file, in any case and with or without a full stop."""

    name = "clevr"
    title = "CLEVR"
    headline = "accuracy"
    rank = 34
    splits = ("val", "test", "train")
    max_new_tokens = 16
    source = Source(
        url="https://cs.stanford.edu/people/jcjohns/clevr/",
        version="1.0",
        licence="CC BY 4.0",
        layout=("questions/CLEVR_val_questions.json", "images/val/"),
        sizes={"val": 149991, "test": 149988, "train": 699989},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(data, (f"CLEVR_{self.split}_questions.json",), self.source.files)
        found = read_object(file)
        need(found, ("questions",), f"'{file}'")
        pictures = Pictures(data, f"images/{self.split}", f"CLEVR_v1.0/images/{self.split}", self.split)
        for number, row in enumerate(found["questions"], 1):
            need(row, ("question", "image_filename"), f"'{file}', question {number}")
            image = row["image_filename"]
            meta = {
                "question": row["question"],
                "answer": row.get("answer"),
                "category": kind_of(row.get("program") or ()),
                "family": row.get("question_family_index"),
            }
            key = str(row.get("question_index", number - 1))
            yield Question(key, (pictures.get(image),), f"{row['question']}\n{SHORT}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        if answered and all(question.meta["answer"] is None for question, _ in answered):
            raise InputError(f"the answers of CLEVR {self.split} are not public; score --split val")
        values = [float(bare(text) == str(question.meta["answer"])) for question, text in answered]
        loose = [float(m4c(text) == m4c(str(question.meta["answer"]))) for question, text in answered]
        parts = {
            "kind": categories(answered, values, "category"),
            "family": categories(answered, values, "family"),
        }
        return Score(
            {"accuracy": percent(values), "accuracy_number_words": percent(loose)}, parts, list(values)
        )
