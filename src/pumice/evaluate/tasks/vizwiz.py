"""VizWiz-VQA (arXiv 1802.08218): photographs and questions by blind people.

A row of its files:

    {"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": [{"answer": "a can"},
     ...], ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.evaluate.files import ImageFolders, read_rows, search, write_json
from pumice.evaluate.metrics.vqa import normalize_m4c, textvqa_accuracy, vizwiz_accuracy
from pumice.evaluate.task import SHORT, Answered, Question, Score, Task, mean_score

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Task):
    """Answers pass LLaVA's answer processor, as before a submission, and then the VizWiz API's scorer.

    The truth of test is not public; write a submission and let EvalAI score it.
    """

    name = "vizwiz"
    title = "VizWiz"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        llava_list = search(data, (f"llava_{self.split}.jsonl",))
        listed = read_rows(llava_list, "image", "question_id") if llava_list else ()
        numbers = {row["image"]: row["question_id"] for row in listed}
        images = ImageFolders(data, self.split, f"images/{self.split}")
        keys = ("image", "question", *(["answers"] if self.split == "val" else []))
        for number, row in enumerate(self.rows(data, f"{self.split}.json", keys=keys)):
            meta = {
                "question": row["question"],
                "answers": [answer["answer"] for answer in row.get("answers", ())],
                "category": row.get("answer_type"),
            }
            prompt = f"{row['question']}\n{UNANSWERABLE}\n{SHORT}"
            llava_id = str(numbers.get(row["image"], number))
            yield Question(row["image"], (images.get(row["image"]),), prompt, meta, llava_id)

    def score(self, answered: Sequence[Answered]) -> Score:
        if self.split == "test":
            raise self.not_public("EvalAI")
        pairs = [(text, question.meta["answers"]) for question, text in answered]
        metrics = {
            "accuracy": [vizwiz_accuracy(normalize_m4c(text), truths) for text, truths in pairs],
            "accuracy_unprocessed": [vizwiz_accuracy(text, truths) for text, truths in pairs],
            "accuracy_answers_processed": [textvqa_accuracy(text, truths) for text, truths in pairs],
        }
        notes = ["VizWiz val: the published numbers are of test, scored on EvalAI"]
        return mean_score(answered, metrics, {"answer type": "category"}, notes)

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        rows = [{"image": question.id, "answer": normalize_m4c(text)} for question, text in answered]
        write_json(path, rows)
