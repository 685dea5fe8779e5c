"""SEED-Bench (arXiv 2307.16125): four choices about images, and about one frame of each video."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.evaluate.files import ImageFolders, locate, read_json, require_keys
from pumice.evaluate.task import (
    LETTER,
    Answered,
    DatasetSource,
    Question,
    Score,
    Task,
    mean_percent,
    scores_by_category,
)
from pumice.files import replacing


class SeedBench(Task):
    """An answer is right if it is the letter alone, as in LLaVA's convert_seed_for_submission.py."""

    name = "seed"
    title = "SEED-Bench"
    headline = "accuracy"
    rank = 10
    splits = ("test",)
    max_new_tokens = 16
    source = DatasetSource(
        url="https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
        version="1 (19,242 questions)",
        licence="CC BY-NC 4.0",
        layout=(
            "SEED-Bench.json",
            "SEED-Bench-image/",
            "SEED-Bench-video-image/TASK_QUESTION.png, the middle frame of each video",
        ),
        sizes={"test": 19242},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(data, ("SEED-Bench.json",), self.source.expected_files)
        contents = read_json(file)
        require_keys(contents, ("questions",), f"'{file}'")
        names = {number: name for name, number in contents.get("question_type", {}).items()}
        images = ImageFolders(data, "SEED-Bench-image")
        frames = ImageFolders(data, "SEED-Bench-video-image")
        keys = (
            "question_id",
            "question",
            "choice_a",
            "choice_b",
            "choice_c",
            "choice_d",
            "answer",
            "data_type",
        )
        for number, row in enumerate(contents["questions"], 1):
            require_keys(row, keys, f"'{file}', question {number}")
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
        kinds = scores_by_category(answered, values, "kind")
        metrics = {"accuracy": mean_percent(values)}
        metrics |= {f"accuracy_{name}": cell.value for name, cell in kinds.items()}
        metrics["accuracy_first_letter"] = mean_percent(loose)
        parts = {"kind": kinds, "ability": scores_by_category(answered, values, "category")}
        unread = sum(text not in tuple("ABCD") for _, text in answered)
        metrics["unread"] = float(unread)
        notes = (
            [f"{unread} answers are no letter alone and count as wrong, as in the original"] if unread else []
        )
        return Score(metrics, parts, list(values), notes=notes)

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        rows = ({"question_id": question.id, "prediction": text} for question, text in answered)
        with replacing(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
