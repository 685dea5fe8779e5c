"""MMMU (arXiv 2311.16502): college questions with one to seven images, in thirty subjects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from pumice.errors import InputError
from pumice.evaluate.archives import read_table
from pumice.evaluate.files import bytes_image, require_keys, write_json
from pumice.evaluate.metrics.choice import mmmu_open_right, mmmu_option, parse_list
from pumice.evaluate.task import LETTER, SHORT, Answered, Question, Score, Task, add_unread, mean_score

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine "
    "Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
DOMAIN = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()}
# The official script reads the subjects in this order, and its random letters depend on the order.
ORDER = {name: number for number, name in enumerate(sorted(DOMAIN))}
_IMAGE = re.compile(r"<image (\d)>")
SEED = 42


def subject_of(key: str) -> str:
    """validation_Art_Theory_3 -> Art_Theory."""
    return "_".join(key.split("_")[1:-1])


class MMMU(Task):
    """Letters and open answers are read as in MMMU's eval_utils.py.

    It draws a random letter (seed 42) where it reads none, and so does the headline;
    accuracy_without_guessing counts such answers as wrong.
    """

    name = "mmmu"
    title = "MMMU"

    def questions(self, data: Path) -> Iterator[Question]:
        files = sorted(data.glob(f"**/{self.split}-*.parquet")) if data.is_dir() else []
        if not files:
            raise InputError(
                f"no {self.split}-*.parquet is in '{data}'; expected {self.source.expected_files}"
            )
        for number, row in enumerate(chain.from_iterable(map(read_table, files)), 1):
            require_keys(
                row, ("id", "question", "options", "question_type"), f"MMMU in '{data}', row {number}"
            )
            yield self._question(row)

    def _question(self, row: dict[str, Any]) -> Question:
        key, options = str(row["id"]), parse_list(str(row["options"]))
        choice = row["question_type"] == "multiple-choice"
        lines = [f"({chr(ord('A') + n)}) {option}" for n, option in enumerate(options)] if choice else []
        body = "\n".join(lines)
        text = f"{row['question']}\n\n{body}\n\n{LETTER}" if choice else f"{row['question']}\n\n{SHORT}"
        order = [int(n) for n in _IMAGE.findall(text)]
        images, present = [], []
        for index, number in enumerate(order):
            image = row.get(f"image_{number}")
            if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
                images.append(bytes_image(f"{key}_{number}", image["bytes"]))
                present.append(index)
        indices = iter(range(len(order)))
        prompt = _IMAGE.sub(lambda _: "<image>" if next(indices) in present else "", text)
        meta = {
            "question": row["question"],
            "answers": parse_list(str(row.get("answer", ""))),
            "options": options if choice else None,
            "category": subject_of(key),
            "domain": DOMAIN.get(subject_of(key)),
            "difficulty": row.get("topic_difficulty"),
            "group": key,
        }
        return Question(key, tuple(images), prompt, meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        if self.split == "test":
            raise self.not_public("EvalAI")
        random = Random(SEED)
        order = sorted(
            range(len(answered)), key=lambda n: ORDER.get(answered[n].question.meta["category"], len(ORDER))
        )
        guessed = [0.0] * len(answered)
        strict = [0.0] * len(answered)
        unread = 0
        for number in order:
            question, text = answered[number]
            truths, options = question.meta["answers"], question.meta["options"]
            if options is None:
                guessed[number] = strict[number] = float(mmmu_open_right(text, truths))
                continue
            letter = mmmu_option(text, options, None)
            unread += letter is None
            strict[number] = float(letter in truths)
            guessed[number] = float((letter or mmmu_option(text, options, random)) in truths)
        categories = {"domain": "domain", "subject": "category", "difficulty": "difficulty"}
        metrics = {"accuracy": guessed, "accuracy_without_guessing": strict}
        score = mean_score(answered, metrics, categories)
        add_unread(score, unread, "name no option; a random one is counted, as in the original")
        return score

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        answers = {}
        for question, text in answered:
            options = question.meta["options"]
            answers[question.id] = text if options is None else mmmu_option(text, options, None) or ""
        write_json(path, answers, indent=2)
