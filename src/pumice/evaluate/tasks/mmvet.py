"""MM-Vet (arXiv 2308.02490): open questions that need several abilities, graded 0 to 1 by a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pumice.evaluate.files import ImageFolders, locate, read_object, require_keys, write_json
from pumice.evaluate.judge import JudgedTask
from pumice.evaluate.task import Answered, CategoryScore, DatasetSource, Question, Score, mean_statistic

PROMPT_VERSION = "pumice-mmvet-1"
PROMPT = """\
Grade an answer against the truth. <AND> in the truth joins elements that must all be in the answer; <OR> \
separates elements of which one is enough. The grade is one of 0.0, 0.1, 0.2, ... 1.0: 0.0 is wholly \
wrong, 1.0 wholly right, and an answer with half of the elements gets 0.5.

Question: {question}
Truth: {truth}
Answer: {answer}

Reply with the grade alone.
Grade: """


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
    rank = 12
    splits = ("test",)
    max_new_tokens = 1024
    prompt_version = PROMPT_VERSION
    source = DatasetSource(
        url="https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
        version="v1 (218 questions)",
        licence="CC BY-NC 4.0; pictures under their own terms",
        layout=("mm-vet.json", "images/"),
        sizes={"test": 218},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(data, ("mm-vet.json",), self.source.expected_files)
        images = ImageFolders(data, "images", "mm-vet/images")
        for key, row in read_object(file).items():
            require_keys(row, ("imagename", "question", "answer", "capability"), f"'{file}', {key}")
            meta = {
                "question": row["question"],
                "answer": row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> "),
                "abilities": sorted(set(row["capability"])),
                "category": "_".join(sorted(set(row["capability"]))),
            }
            yield Question(
                key, (images.get(row["imagename"]),), row["question"], meta, key.removeprefix("v1_")
            )

    def score(self, answered: Sequence[Answered]) -> Score:
        # 1. Ask the judge, and read a grade from each reply.
        prompts = [
            (
                question.id,
                PROMPT.format(
                    question=question.meta["question"],
                    truth=question.meta["answer"],
                    answer=text,
                ),
            )
            for question, text in answered
        ]
        replies = self.replies(prompts, temperature=0.0, max_tokens=8)
        grades = [parse_grade(reply.text) if reply else None for reply in replies]
        statistic = mean_statistic(grades)
        unparsed = sum(grade is None for grade in grades)
        # 2. Average the grades by ability and by combination of abilities.
        abilities: dict[str, CategoryScore] = {}
        combined: dict[str, CategoryScore] = {}
        names = dict.fromkeys(name for question, _ in answered for name in question.meta["abilities"])
        for name in names:
            members = np.array(
                [name in question.meta["abilities"] for question, _ in answered], dtype=np.float64
            )
            abilities[name] = CategoryScore(statistic(members), _count_graded(members, grades))
        for name in dict.fromkeys(str(question.meta["category"]) for question, _ in answered):
            members = np.array(
                [question.meta["category"] == name for question, _ in answered], dtype=np.float64
            )
            combined[name] = CategoryScore(statistic(members), _count_graded(members, grades))
        notes = ["judges differ: compare only results of one judge and one prompt version"]
        if unparsed:
            notes.append(f"{unparsed} replies of the judge do not parse and are in no mean")
        metrics = {"total": statistic(np.ones(len(answered))), "unparsed": float(unparsed)}
        parts = {"ability": abilities, "abilities together": combined}
        return Score(
            metrics, parts, list(grades), None, notes, self.judge_summary(replies, unparsed, answered)
        )

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write the file that MM-Vet's own evaluator reads."""
        answers = {question.id: text for question, text in answered}
        write_json(path, answers, indent=2)


def _count_graded(members: np.ndarray, grades: Sequence[float | None]) -> int:
    return sum(bool(m) and grade is not None for m, grade in zip(members.tolist(), grades, strict=True))
