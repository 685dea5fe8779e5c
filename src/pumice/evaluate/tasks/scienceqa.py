"""ScienceQA (arXiv 2209.09513): school questions with choices, about half of them with a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pumice.errors import InputError
from pumice.evaluate.files import Pictures, locate, need, read_object, write_json
from pumice.evaluate.metrics.choice import scienceqa_option
from pumice.evaluate.task import (
    LETTER,
    Answered,
    Question,
    Score,
    Source,
    Task,
    categories,
    mean_statistic,
    percent,
)

LETTERS = "ABCDE"


def prompt_of(problem: dict[str, Any]) -> str:
    """LLaVA's CQM form: context, question, choices."""
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
    rank = 4
    splits = ("test", "val", "minitest", "minival", "train")
    max_new_tokens = 16
    source = Source(
        url="https://github.com/lupantech/ScienceQA, data/scienceqa",
        version="problems.json with 21,208 problems",
        licence="CC BY-NC-SA 4.0",
        layout=("problems.json, pid_splits.json", "images/test/ID/image.png"),
        sizes={"test": 4241, "val": 4241, "train": 12726},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        splits = locate(data, ("pid_splits.json",), self.source.files)
        file = locate(data, ("problems.json",), self.source.files)
        chosen, problems = read_object(splits), read_object(file)
        need(chosen, (self.split,), f"'{splits}'")
        folder = {"minitest": "test", "minival": "val"}.get(self.split, self.split)
        pictures = Pictures(data, f"images/{folder}", folder)
        missing = [key for key in chosen[self.split] if key not in problems]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(chosen[self.split])} problems of '{splits}' are not in '{file}', "
                f"the first is {missing[0]}; fetch both from one version"
            )
        for key in chosen[self.split]:
            problem = problems[key]
            need(problem, ("question", "choices", "answer"), f"'{file}', problem {key}")
            images = (pictures.get(f"{key}/{problem['image']}"),) if problem.get("image") else ()
            meta = {
                "question": problem["question"],
                "choices": len(problem["choices"]),
                "answer": LETTERS[problem["answer"]],
                "category": "image" if images else "text" if problem.get("hint") else "neither",
                "subject": problem.get("subject"),
                "grade": problem.get("grade"),
            }
            yield Question(str(key), images, f"{prompt_of(problem)}\n{LETTER}", meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        chosen = [scienceqa_option(text, question.meta["choices"]) for question, text in answered]
        values = [
            float(option >= 0 and LETTERS[option] == question.meta["answer"])
            for option, (question, _) in zip(chosen, answered, strict=True)
        ]
        with_image = [
            value if question.images else None for value, (question, _) in zip(values, answered, strict=True)
        ]
        seen = [value for value in with_image if value is not None]
        unread = sum(option < 0 for option in chosen)
        return Score(
            {
                "image_accuracy": percent(seen) if seen else float("nan"),
                "accuracy": percent(values),
                "unread": float(unread),
            },
            {
                "modality": categories(answered, values, "category"),
                "subject": categories(answered, values, "subject"),
                "grade": categories(answered, values, "grade"),
            },
            list(values),
            statistic=mean_statistic(with_image),
            notes=[f"{unread} answers name no option and count as wrong"] if unread else [],
        )

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """The result file of the benchmark's leaderboard."""
        chosen = {
            question.id: scienceqa_option(text, question.meta["choices"]) for question, text in answered
        }
        outputs = {question.id: text for question, text in answered}
        score = self.score(answered).metrics
        right = round(score["accuracy"] * len(answered) / 100)
        found = {"acc": score["accuracy"], "correct": right, "count": len(answered)}
        write_json(path, {**found, "results": chosen, "outputs": outputs}, indent=2)
