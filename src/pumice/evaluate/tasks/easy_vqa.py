"""easy-vqa (PyPI, MIT): simple questions about small drawings of one coloured shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.errors import InputError
from pumice.evaluate.files import ImageFolders, read_json
from pumice.evaluate.metrics.vqa import lower_without_period
from pumice.evaluate.task import SHORT, Answered, Question, Score, Task, mean_percent, mean_score

ROW = 3  # columns: question, answer, number of the image


def kind_of(question: str, answer: str) -> str:
    """Return what the question asks: whether something is or is not there, a colour, or a shape."""
    if answer in ("yes", "no"):
        words = question.rstrip("?").split()
        return "not there" if "not" in words or "no" in words else "there"
    return "colour" if "color" in question else "shape"


class EasyVQA(Task):
    """An answer is right if it equals the truth (one of 13); case and a final full stop do not count."""

    name = "easy-vqa"
    title = "easy-VQA"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        file = self.locate(data, f"{self.split}/questions.json")
        rows = read_json(file)
        if not isinstance(rows, list):
            raise InputError(f"'{file}' holds no list; is this the official file?")
        folders = (f"{parent}{self.split}/images" for parent in ("", "data/", "easy_vqa/data/"))
        images = ImageFolders(data, *folders)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, list) or len(row) != ROW or not all(isinstance(t, str) for t in row[:2]):
                raise InputError(
                    f"'{file}', question {number}: expected [question, answer, picture], found {row!r}"
                )
            question, answer, image = row
            meta = {"question": question, "answer": answer, "category": kind_of(question, answer)}
            yield Question(str(number - 1), (images.get(f"{image}.png"),), f"{question}\n{SHORT}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        values = [float(lower_without_period(text) == question.meta["answer"]) for question, text in answered]
        categories = {"question": "category", "answer": "answer"}
        score = mean_score(answered, {"accuracy": values}, categories)
        open_ended = [
            value
            for value, (question, _) in zip(values, answered, strict=True)
            if question.meta["answer"] not in ("yes", "no")
        ]
        score.metrics["accuracy_colour_and_shape"] = mean_percent(open_ended)
        return score
