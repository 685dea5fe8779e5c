"""SEED-Bench (arXiv 2307.16125): four choices about images, and about one frame of each video.

A row of its files:

    {"question_id": "101669", "question": "How many towels?", "choice_a": "One", ...,
     "choice_d": "Four", "answer": "A", ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.evaluate.files import ImageFolders, read_json, read_rows
from pumice.evaluate.task import LETTER, Answered, Question, Score, Task, add_unread, mean_percent, mean_score
from pumice.files import replacing


class SeedBench(Task):
    """An answer is right if it is the letter alone, as in LLaVA's convert_seed_for_submission.py."""

    name = "seed"
    title = "SEED-Bench"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        file = self.locate(data, "SEED-Bench.json")
        names = {
            number: name for name, number in read_json(file, "questions").get("question_type", {}).items()
        }
        images = ImageFolders(data, "SEED-Bench-image")
        frames = ImageFolders(data, "SEED-Bench-video-image")
        keys = ("question_id", "question", *(f"choice_{letter}" for letter in "abcd"), "answer", "data_type")
        for row in read_rows(file, *keys, at="questions"):
            key, kind = str(row["question_id"]), row.get("question_type_id")
            if row["data_type"] == "image":
                name = str(row["data_id"])
                picture = images.get(name, f"{name}.jpg", f"{name}.png")
            else:
                picture = frames.get(
                    f"{kind}_{key}.png", f"{kind}_{key}", f"{key}.png", f"{row['data_id']}.png"
                )
            choices = [f"{letter}. {row['choice_' + letter.lower()]}" for letter in "ABCD"]
            meta = {
                "question": row["question"],
                "answer": row["answer"],
                "category": names.get(kind, kind),
                "kind": row["data_type"],
            }
            yield Question(key, (picture,), "\n".join([row["question"], *choices, LETTER]), meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        values = [float(text == question.meta["answer"]) for question, text in answered]
        loose = [float(text.strip()[:1].upper() == question.meta["answer"]) for question, text in answered]
        unread = sum(text not in tuple("ABCD") for _, text in answered)
        categories = {"kind": "kind", "ability": "category"}
        score = mean_score(answered, {"accuracy": values}, categories)
        kinds = score.categories["kind"].items()
        score.metrics |= {f"accuracy_{name}": cell.value for name, cell in kinds}
        score.metrics["accuracy_first_letter"] = mean_percent(loose)
        add_unread(score, unread, "are no letter alone, which counts as wrong, as in the original")
        return score

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        rows = ({"question_id": question.id, "prediction": text} for question, text in answered)
        with replacing(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
