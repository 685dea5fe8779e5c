"""VQAv2 (arXiv 1612.00837): questions about COCO images with short answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pumice.errors import InputError
from pumice.evaluate.files import (
    DataFile,
    ImageFolders,
    locate,
    read_json,
    read_jsonl,
    require_keys,
    search,
    write_json,
)
from pumice.evaluate.metrics.vqa import normalize_m4c, vqa_accuracy, vqa_accuracy_first
from pumice.evaluate.task import (
    SHORT,
    Answered,
    DatasetSource,
    Question,
    Score,
    Task,
    mean_percent,
    scores_by_category,
)


class VQAv2(Task):
    """Answers pass LLaVA's answer processor, as before a submission, and then VQA's own scorer.

    The truths of test-dev and test are not public; write a submission and let EvalAI score it.
    """

    name = "vqav2"
    title = "VQAv2"
    headline = "accuracy"
    rank = 1
    splits = ("val", "test-dev", "test")
    max_new_tokens = 16
    source = DatasetSource(
        url="https://visualqa.org/download.html",
        version="v2.0, balanced real images (April 2017)",
        licence="annotations CC BY 4.0; pictures under COCO's terms",
        layout=(
            "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/",
            "for test-dev: v2_OpenEnded_mscoco_test-dev2015_questions.json (or LLaVA's "
            "llava_vqav2_mscoco_test-dev2015.jsonl) and test2015/",
        ),
        sizes={"val": 214354, "test-dev": 107394, "test": 447793},
    )
    coco: ClassVar[dict[str, str]] = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}

    def questions(self, data: Path) -> Iterator[Question]:
        split_name = self.coco[self.split]
        file = locate(
            data,
            (f"v2_OpenEnded_mscoco_{split_name}_questions.json", f"llava_vqav2_mscoco_{split_name}.jsonl"),
            self.source.expected_files,
        )
        truth = self._truth(data) if self.split == "val" else {}
        folder = "val2014" if self.split == "val" else "test2015"
        images = ImageFolders(data, folder, f"images/{folder}")
        for number, row in enumerate(_rows(file), 1):
            if file.name.endswith(".jsonl"):
                require_keys(row, ("question_id", "image", "text"), f"'{file}', row {number}")
                yield Question(str(row["question_id"]), (images.get(row["image"]),), row["text"])
                continue
            require_keys(row, ("question_id", "image_id", "question"), f"'{file}', question {number}")
            annotation = truth.get(row["question_id"], {})
            if self.split == "val" and not annotation:
                raise InputError(
                    f"question {row['question_id']} of '{file}' has no annotation; are both files of val2014?"
                )
            image = f"COCO_{folder}_{row['image_id']:012d}.jpg"
            yield Question(
                str(row["question_id"]), (images.get(image),), f"{row['question']}\n{SHORT}",
                {"question": row["question"], **annotation},
            )  # fmt: skip

    def _truth(self, data: Path) -> dict[int, dict[str, object]]:
        file = locate(data, ("v2_mscoco_val2014_annotations.json",), self.source.expected_files)
        rows = read_json(file)
        require_keys(rows, ("annotations",), f"'{file}'")
        truth: dict[int, dict[str, object]] = {}
        for number, row in enumerate(rows["annotations"], 1):
            require_keys(row, ("question_id", "answers"), f"'{file}', annotation {number}")
            truth[row["question_id"]] = {
                "answers": [answer["answer"] for answer in row["answers"]],
                "category": row.get("answer_type"),
                "type": row.get("question_type"),
            }
        return truth

    def score(self, answered: Sequence[Answered]) -> Score:
        if self.split != "val":
            raise InputError(
                f"the answers of VQAv2 {self.split} are not public; write --submission FILE "
                "and upload it to EvalAI, or score --split val"
            )
        values = [vqa_accuracy(normalize_m4c(text), question.meta["answers"]) for question, text in answered]
        raw = [vqa_accuracy(text, question.meta["answers"]) for question, text in answered]
        first = [vqa_accuracy_first(text, question.meta["answers"]) for question, text in answered]
        return Score(
            {
                "accuracy": mean_percent(values),
                "accuracy_unprocessed": mean_percent(raw),
                "accuracy_first_scorer": mean_percent(first),
            },
            {
                "answer type": scores_by_category(answered, values, "category"),
                "question type": scores_by_category(answered, values, "type"),
            },
            list(values),
            notes=["VQAv2 val: the published numbers are of test-dev, scored on EvalAI"],
        )

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write EvalAI's list. EvalAI expects an answer to every question of test2015, so the questions that
        were not asked get an empty answer if the list of all questions is in the folder."""
        rows = [{"question_id": int(q.id), "answer": normalize_m4c(text)} for q, text in answered]
        all_questions = None
        if self.split != "val":
            names = ("v2_OpenEnded_mscoco_test2015_questions.json", "llava_vqav2_mscoco_test2015.jsonl")
            all_questions = search(data, names)
        if all_questions is not None:
            answered_ids = {row["question_id"] for row in rows}
            others = (row["question_id"] for row in _rows(all_questions))
            rows += [{"question_id": other, "answer": ""} for other in others if other not in answered_ids]
        write_json(path, rows)


def _rows(file: DataFile) -> list[dict[str, Any]]:
    if file.name.endswith(".jsonl"):
        return read_jsonl(file)
    contents = read_json(file)
    require_keys(contents, ("questions",), f"'{file}'")
    rows: list[dict[str, Any]] = contents["questions"]
    return rows
