"""VQAv2 (arXiv 1612.00837): questions about COCO images with short answers.

A row of its two files:

    {"question_id": 262148000, "image_id": 262148, "question": "Where is he looking?"}
    {"question_id": 262148000, "answers": [{"answer": "down"}, ...], ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pumice.errors import InputError
from pumice.evaluate.files import ImageFolders, read_rows, search, write_json
from pumice.evaluate.metrics.vqa import normalize_m4c, vqa_accuracy, vqa_accuracy_first
from pumice.evaluate.task import SHORT, Answered, Question, Score, Task, mean_score


class VQAv2(Task):
    """Answers pass LLaVA's answer processor, as before a submission, and then VQA's own scorer.

    The truths of test-dev and test are not public; write a submission and let EvalAI score it.
    """

    name = "vqav2"
    title = "VQAv2"
    max_new_tokens = 16
    coco: ClassVar[dict[str, str]] = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}

    def questions(self, data: Path) -> Iterator[Question]:
        name = self.coco[self.split]
        names = (f"v2_OpenEnded_mscoco_{name}_questions.json", f"llava_vqav2_mscoco_{name}.jsonl")
        file = self.locate(data, *names)
        folder = "val2014" if self.split == "val" else "test2015"
        images = ImageFolders(data, folder, f"images/{folder}")
        if file.name.endswith(".jsonl"):
            for row in read_rows(file, "question_id", "image", "text"):
                yield Question(str(row["question_id"]), (images.get(row["image"]),), row["text"])
            return
        truth = self._truth(data) if self.split == "val" else {}
        for row in read_rows(file, "question_id", "image_id", "question", at="questions"):
            annotation = truth.get(row["question_id"], {})
            if self.split == "val" and not annotation:
                raise InputError(
                    f"question {row['question_id']} of '{file}' has no annotation; are both files of val2014?"
                )
            image = images.get(f"COCO_{folder}_{row['image_id']:012d}.jpg")
            meta = {"question": row["question"], **annotation}
            yield Question(str(row["question_id"]), (image,), f"{row['question']}\n{SHORT}", meta)

    def _truth(self, data: Path) -> dict[int, dict[str, Any]]:
        file, keys = "v2_mscoco_val2014_annotations.json", ("question_id", "answers")
        return {
            row["question_id"]: {
                "answers": [answer["answer"] for answer in row["answers"]],
                "category": row.get("answer_type"),
                "type": row.get("question_type"),
            }
            for row in self.rows(data, file, keys=keys, at="annotations")
        }

    def score(self, answered: Sequence[Answered]) -> Score:
        if self.split != "val":
            raise self.not_public("EvalAI")
        pairs = [(text, question.meta["answers"]) for question, text in answered]
        metrics = {
            "accuracy": [vqa_accuracy(normalize_m4c(text), truths) for text, truths in pairs],
            "accuracy_unprocessed": [vqa_accuracy(text, truths) for text, truths in pairs],
            "accuracy_first_scorer": [vqa_accuracy_first(text, truths) for text, truths in pairs],
        }
        notes = ["VQAv2 val: the published numbers are of test-dev, scored on EvalAI"]
        categories = {"answer type": "category", "question type": "type"}
        return mean_score(answered, metrics, categories, notes)

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
            others = (row["question_id"] for row in read_rows(all_questions, "question_id", at="questions"))
            rows += [{"question_id": other, "answer": ""} for other in others if other not in answered_ids]
        write_json(path, rows)
