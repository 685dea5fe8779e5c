"""VizWiz-VQA (arXiv 1802.08218): photographs and questions by blind people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.errors import InputError
from pumice.evaluate.files import (
    ImageFolders,
    locate,
    read_json,
    read_jsonl,
    require_keys,
    search,
    write_json,
)
from pumice.evaluate.metrics.vqa import normalize_m4c, textvqa_accuracy, vizwiz_accuracy
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

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Task):
    """Answers pass LLaVA's answer processor, as before a submission, and then the VizWiz API's scorer.

    The truth of test is not public; write a submission and let EvalAI score it.
    """

    name = "vizwiz"
    title = "VizWiz"
    headline = "accuracy"
    rank = 3
    splits = ("val", "test")
    max_new_tokens = 16
    source = DatasetSource(
        url="https://vizwiz.org/tasks-and-datasets/vqa/",
        version="2023 (Annotations.zip with 4,319 and 8,000 questions)",
        licence="CC BY 4.0",
        layout=("val.json or test.json (in Annotations.zip)", "val/ or test/ with the photographs"),
        sizes={"val": 4319, "test": 8000},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        file = locate(data, (f"{self.split}.json",), self.source.expected_files)
        llava_list = search(data, (f"llava_{self.split}.jsonl",))
        numbers = {row["image"]: row["question_id"] for row in read_jsonl(llava_list)} if llava_list else {}
        images = ImageFolders(data, self.split, f"images/{self.split}")
        for number, row in enumerate(read_json(file), 1):
            require_keys(row, ("image", "question"), f"'{file}', question {number}")
            if self.split == "val":
                require_keys(row, ("answers",), f"'{file}', question {number}")
            meta = {
                "question": row["question"],
                "answers": [answer["answer"] for answer in row.get("answers", ())],
                "category": row.get("answer_type"),
            }
            prompt = f"{row['question']}\n{UNANSWERABLE}\n{SHORT}"
            llava_id = str(numbers.get(row["image"], number - 1))
            yield Question(row["image"], (images.get(row["image"]),), prompt, meta, llava_id)

    def score(self, answered: Sequence[Answered]) -> Score:
        if self.split == "test":
            raise InputError(
                "the answers of VizWiz test are not public; write --submission FILE and upload it to "
                "EvalAI, or score --split val"
            )
        values = [
            vizwiz_accuracy(normalize_m4c(text), question.meta["answers"]) for question, text in answered
        ]
        raw = [vizwiz_accuracy(text, question.meta["answers"]) for question, text in answered]
        both = [textvqa_accuracy(text, question.meta["answers"]) for question, text in answered]
        return Score(
            {
                "accuracy": mean_percent(values),
                "accuracy_unprocessed": mean_percent(raw),
                "accuracy_answers_processed": mean_percent(both),
            },
            {"answer type": scores_by_category(answered, values, "category")},
            list(values),
            notes=["VizWiz val: the published numbers are of test, scored on EvalAI"],
        )

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        rows = [{"image": question.id, "answer": normalize_m4c(text)} for question, text in answered]
        write_json(path, rows)
