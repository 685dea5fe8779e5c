"""MM-Vet (arXiv 2308.02490): open questions that need several abilities, graded 0 to 1 by a judge.

A row of its files:

    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
     "capability": ["ocr", "math"], ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pumice.evaluate.files import ImageFolders, write_json
from pumice.evaluate.judge import JudgedTask
from pumice.evaluate.task import Answered, Question, Score, mean_statistic, scores_by_category

PROMPT_VERSION = "pumice-mmvet-1"
PROMPT = (Path(__file__).parent / "mmvet.txt").read_text(encoding="utf-8")


def parse_grade(reply: str) -> float | None:
    """Return the first word as a number from 0 to 1, else None (the original then asks again)."""
    try:
        grade = float(reply.partition(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


class MMVet(JudgedTask):
    """Headline: the mean grade, times 100."""

    name = "mmvet"
    title = "MM-Vet"
    headline = "total"
    max_new_tokens = 1024
    prompt_version = PROMPT_VERSION

    def questions(self, data: Path) -> Iterator[Question]:
        images = ImageFolders(data, "images", "mm-vet/images")
        keys = ("imagename", "question", "answer", "capability")
        for row in self.rows(data, "mm-vet.json", keys=keys, at="*"):
            meta = {
                "question": row["question"],
                "answer": row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> "),
                "abilities": sorted(set(row["capability"])),
                "category": "_".join(sorted(set(row["capability"]))),
            }
            image = images.get(row["imagename"])
            yield Question(row["key"], (image,), row["question"], meta, row["key"].removeprefix("v1_"))

    def score(self, answered: Sequence[Answered]) -> Score:
        # 1. Ask the judge, and read a grade from each reply.
        prompts = [
            (q.id, PROMPT.format(question=q.meta["question"], truth=q.meta["answer"], answer=text))
            for q, text in answered
        ]
        grades, notes, judge = self.grade(prompts, parse_grade, temperature=0.0, max_tokens=8)
        statistic = mean_statistic(grades)
        # 2. Average the grades by ability and by combination of abilities.
        parts = {
            "ability": scores_by_category(answered, grades, "abilities"),
            "abilities together": scores_by_category(answered, grades, "category"),
        }
        metrics = {"total": statistic(np.ones(len(answered))), "unparsed": float(judge["unparsed"])}
        return Score(metrics, parts, grades, None, notes, judge)

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write the file that MM-Vet's own evaluator reads."""
        answers = {question.id: text for question, text in answered}
        write_json(path, answers, indent=2)
