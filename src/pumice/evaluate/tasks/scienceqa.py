"""ScienceQA (arXiv 2209.09513): school questions with choices, about half of them with a picture.

A row of its files:

    "4": {"question": "Which is solid?", "choices": ["water", "stone"], "answer": 1,
     "image": "image.png", "hint": "", ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pumice.errors import InputError, counted
from pumice.evaluate.files import ImageFolders, read_json, read_rows, write_json
from pumice.evaluate.metrics.choice import scienceqa_option
from pumice.evaluate.task import (
    LETTER,
    Answered,
    Question,
    Score,
    Task,
    add_unread,
    mean_percent,
    mean_score,
    mean_statistic,
)

LETTERS = "ABCDE"


def prompt_of(problem: dict[str, Any]) -> str:
    """Return the prompt in LLaVA's CQM form: context, question, choices."""
    choices = " ".join(
        f"({letter}) {text}" for letter, text in zip(LETTERS, problem["choices"], strict=False)
    )
    context = str(problem.get("hint", "")).strip() or "N/A"
    text = f"Context: {context}\nQuestion: {problem['question']}\nOptions: {choices}\n"
    return text.replace("  ", " ").strip()


class ScienceQA(Task):
    """Headline: accuracy on the questions with a picture. LLaVA's eval_science_qa.py reads the letter."""

    name = "scienceqa"
    title = "ScienceQA"
    headline = "image_accuracy"
    splits = ("test", "val", "minitest", "minival", "train")
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        splits, file = self.locate(data, "pid_splits.json"), self.locate(data, "problems.json")
        ids = read_json(splits, self.split)[self.split]
        problems = {row["key"]: row for row in read_rows(file, "question", "choices", "answer", at="*")}
        folder = {"minitest": "test", "minival": "val"}.get(self.split, self.split)
        images = ImageFolders(data, f"images/{folder}", folder)
        if missing := [key for key in ids if key not in problems]:
            raise InputError(
                f"{counted(len(missing), 'problem', 'are', of=len(ids))} not in '{file}', the first is "
                f"{missing[0]}; fetch it and '{splits}' from one version"
            )
        for key in ids:
            problem = problems[key]
            question_images = (images.get(f"{key}/{problem['image']}"),) if problem.get("image") else ()
            meta = {
                "question": problem["question"],
                "choices": len(problem["choices"]),
                "answer": LETTERS[problem["answer"]],
                "category": "image" if question_images else "text" if problem.get("hint") else "neither",
                "subject": problem.get("subject"),
                "grade": problem.get("grade"),
            }
            yield Question(str(key), question_images, f"{prompt_of(problem)}\n{LETTER}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        options = [scienceqa_option(text, question.meta["choices"]) for question, text in answered]
        values = [
            float(option >= 0 and LETTERS[option] == question.meta["answer"])
            for option, (question, _) in zip(options, answered, strict=True)
        ]
        with_image = [
            value if question.images else None for value, (question, _) in zip(values, answered, strict=True)
        ]
        image_values = [value for value in with_image if value is not None]
        categories = {"modality": "category", "subject": "subject", "grade": "grade"}
        score = mean_score(answered, {"accuracy": values}, categories)
        image_accuracy = mean_percent(image_values) if image_values else float("nan")
        score.metrics = {"image_accuracy": image_accuracy, **score.metrics}
        add_unread(score, options.count(-1), "name no option, which counts as wrong")
        score.statistic = mean_statistic(with_image)
        return score

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write the result file of the benchmark's leaderboard."""
        options = {
            question.id: scienceqa_option(text, question.meta["choices"]) for question, text in answered
        }
        outputs = {question.id: text for question, text in answered}
        score = self.score(answered).metrics
        correct = round(score["accuracy"] * len(answered) / 100)
        summary = {"acc": score["accuracy"], "correct": correct, "count": len(answered)}
        write_json(path, {**summary, "results": options, "outputs": outputs}, indent=2)
