"""easy-vqa (PyPI, MIT): small drawn pictures of one coloured shape, and simple questions about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.errors import InputError
from pumice.evaluate.files import Pictures, locate, read_json
from pumice.evaluate.metrics.vqa import bare
from pumice.evaluate.task import SHORT, Answered, Question, Score, Source, Task, categories, percent

ROW = 3  # question, answer, number of the picture


def kind_of(question: str, answer: str) -> str:
    """What is asked for: whether something is there or is not there, a colour, or a shape."""
    if answer in ("yes", "no"):
        words = question.rstrip("?").split()
        return "not there" if "not" in words or "no" in words else "there"
    return "colour" if "color" in question else "shape"


class EasyVQA(Task):
    """One of thirteen answers; the whole answer must be it, in any case, with or without a full stop."""

    name = "easy-vqa"
    title = "easy-VQA"
    headline = "accuracy"
    rank = 40
    splits = ("test", "train")
    max_new_tokens = 16
    source = Source(
        url="https://pypi.org/project/easy-vqa/",
        version="1.0 (pip download --no-deps easy-vqa==1.0, unzip)",
        licence="MIT",
        layout=("easy_vqa/data/test/questions.json", "easy_vqa/data/test/images/"),
        sizes={"test": 9673, "train": 38575},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(data, (f"{self.split}/questions.json",), self.source.files)
        rows = read_json(file)
        if not isinstance(rows, list):
            raise InputError(f"'{file}' holds no list; is this the official file?")
        folders = (f"{above}{self.split}/images" for above in ("", "data/", "easy_vqa/data/"))
        pictures = Pictures(data, *folders)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, list) or len(row) != ROW or not all(isinstance(t, str) for t in row[:2]):
                raise InputError(
                    f"'{file}', question {number}: expected [question, answer, picture], found {row!r}"
                )
            question, answer, image = row
            meta = {"question": question, "answer": answer, "category": kind_of(question, answer)}
            picture = pictures.get(f"{image}.png")
            yield Question(str(number - 1), (picture,), f"{question}\n{SHORT}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        values = [float(bare(text) == question.meta["answer"]) for question, text in answered]
        open_ended = [
            value
            for value, (question, _) in zip(values, answered, strict=True)
            if question.meta["answer"] not in ("yes", "no")
        ]
        metrics = {"accuracy": percent(values), "accuracy_colour_and_shape": percent(open_ended)}
        parts = {
            "question": categories(answered, values, "category"),
            "answer": categories(answered, values, "answer"),
        }
        return Score(metrics, parts, list(values))
