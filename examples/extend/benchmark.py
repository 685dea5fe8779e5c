"""A benchmark of one's own: counting, whose score is the mean distance from the right number.

    python examples/extend/benchmark.py eval counting --data FOLDER --model MODEL --predictions OUT.jsonl

FOLDER holds `counting.json`, a list of {"id", "image", "question", "count"}, and `images/`. This is the
`pumice` command with one more benchmark. The headline is no share of right answers, so that it brings its own
statistic.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pumice.cli import main
from pumice.evaluate.files import ImageFolders, read_rows
from pumice.evaluate.task import SHORT, Answered, DatasetSource, Floats, Question, Score, Task
from pumice.evaluate.tasks import register

WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
MOST = 10  # the largest distance that counts; an answer without a number has it


def number_in(text: str) -> int | None:
    """Return the first number of an answer, in digits or as a word."""
    for word in re.findall(r"[a-z]+|\d+", text.lower()):
        if word.isdigit():
            return int(word)
        if word in WORDS:
            return WORDS.index(word)
    return None


class Counting(Task):
    name = "counting"
    title = "Counting"
    headline = "distance"
    unit = ""
    lower_is_better = True
    splits = ("test",)
    source = DatasetSource("", "1", "your own", ["counting.json", "images/"])

    def questions(self, data: Path) -> Iterator[Question]:
        images = ImageFolders(data, "images")
        for row in read_rows(self.locate(data, "counting.json"), "id", "image", "question", "count"):
            prompt = f"{row['question']}\n{SHORT}"
            yield Question(str(row["id"]), (images.get(row["image"]),), prompt, {"count": int(row["count"])})

    def score(self, answered: Sequence[Answered]) -> Score:
        distances = np.array([self._distance(question, text) for question, text in answered])

        def mean_distance(weights: Floats) -> float:
            return float((weights * distances).sum() / weights.sum())

        headline = mean_distance(np.ones(len(answered)))
        values = [1 - float(distance) / MOST for distance in distances]
        return Score({"distance": headline}, values=list(values), statistic=mean_distance)

    @staticmethod
    def _distance(question: Question, text: str) -> int:
        number = number_in(text)
        return MOST if number is None else min(MOST, abs(number - int(question.meta["count"])))


register(Counting)

if __name__ == "__main__":
    sys.exit(main())
