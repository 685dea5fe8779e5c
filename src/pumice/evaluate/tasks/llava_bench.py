"""LLaVA-Bench (arXiv 2304.08485, 2310.03744): a judge compares answers with GPT-4's, reading captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pumice.errors import InputError
from pumice.evaluate.files import DataFile, ImageFolders, read_rows
from pumice.evaluate.judge import JudgedTask
from pumice.evaluate.task import Answered, CategoryScore, Floats, Question, Score

PROMPT_VERSION = "pumice-llava-bench-1"
PROMPT = (Path(__file__).parent / "llava_bench.txt").read_text(encoding="utf-8")


def parse_scores(reply: str) -> tuple[float, float] | None:
    """Return the two numbers of the first line, separated by spaces or a comma; None unless there are two."""
    words = reply.partition("\n")[0].replace(",", " ").split()
    try:
        first, second = map(float, words)
    except ValueError:
        return None
    return (first, second) if 0 <= first <= 10 and 0 <= second <= 10 else None


class LlavaBench(JudgedTask):
    """Headline: the mean grade of the answers, in percent of the mean grade of GPT-4's answers."""

    name = "llava-bench"
    title = "LLaVA-Bench (in the wild)"
    headline = "relative"
    max_new_tokens = 1024
    prompt_version = PROMPT_VERSION
    question_files: tuple[str, ...] = ("questions.jsonl",)
    context_files: tuple[str, ...] = ("context.jsonl",)
    reference_files: tuple[str, ...] = ("answers_gpt4.jsonl",)
    folders: tuple[str, ...] = ("images",)

    def questions(self, data: Path) -> Iterator[Question]:
        file = self.locate(data, *self.question_files)
        contexts = self._contexts(self.locate(data, *self.context_files))
        answers = self.rows(data, *self.reference_files, keys=("question_id", "text"))
        references = {str(row["question_id"]): row["text"] for row in answers}
        images = ImageFolders(data, *self.folders)
        for row in read_rows(file, "question_id", "image", "text", "category"):
            key, image = str(row["question_id"]), row["image"]
            if key not in references or image not in contexts:
                raise InputError(
                    f"question {key} of '{file}' has no answer of GPT-4 or no description of {image!r}; "
                    "fetch all files from one place"
                )
            meta = {
                "question": row["text"],
                "category": row["category"],
                "answer": references[key],
                "context": contexts[image],
            }
            yield Question(key, (images.get(image, f"COCO_val2014_{image}"),), row["text"], meta)

    def _contexts(self, file: DataFile) -> dict[str, str]:
        contexts = {}
        for row in read_rows(file, "image"):
            caption = row.get("caption", row.get("captions", ""))
            boxes = [f"{b['category']}: {b['bbox']}" for b in row.get("instances", ())]
            lines = [caption] if isinstance(caption, str) else list(caption)
            contexts[row["image"]] = "\n".join([*lines, *boxes])
        return contexts

    def score(self, answered: Sequence[Answered]) -> Score:
        # 1. Ask the judge, and read both grades from each reply.
        prompts = []
        for question, text in answered:
            meta = question.meta
            prompt = PROMPT.format(
                context=meta["context"], question=meta["question"], reference=meta["answer"], answer=text
            )
            prompts.append((question.id, prompt))
        pairs, notes, judge = self.grade(prompts, parse_scores, temperature=0.0, max_tokens=1024)
        parsed = np.array([pair is not None for pair in pairs], dtype=np.float64)
        grades = np.array([pair or (0.0, 0.0) for pair in pairs]).reshape(-1, 2)
        kinds = np.array([question.meta["category"] for question, _ in answered])

        def relative(weights: Floats) -> float:
            w = weights * parsed
            reference = float((w * grades[:, 0]).sum())
            return 100 * float((w * grades[:, 1]).sum()) / reference if reference else float("nan")

        # 2. Compute the ratio, in all and by category; a reply without grades has weight 0.
        cells = {
            str(kind): CategoryScore(
                relative((kinds == kind).astype(float)), int(((kinds == kind) * parsed).sum())
            )
            for kind in dict.fromkeys(kinds.tolist())
        }
        metrics: dict[str, float] = {"relative": relative(np.ones(len(answered)))}
        if total := parsed.sum():
            metrics["grade"] = float((parsed * grades[:, 1]).sum() / total)
            metrics["grade_reference"] = float((parsed * grades[:, 0]).sum() / total)
        metrics["unparsed"] = float(judge["unparsed"])
        values: list[float | None] = [pair[1] / 10 if pair else None for pair in pairs]
        return Score(metrics, {"category": cells}, values, relative, notes, judge)


class LlavaBenchCoco(LlavaBench):
    """The first version: 30 images of COCO val2014, three questions each."""

    name = "llava-bench-coco"
    title = "LLaVA-Bench (COCO)"
    question_files = ("qa90_questions.jsonl", "coco2014_val_qa_eval/qa90_questions.jsonl")
    context_files = ("caps_boxes_coco2014_val_80.jsonl",)
    reference_files = ("qa90_gpt4_answer.jsonl", "coco2014_val_qa_eval/qa90_gpt4_answer.jsonl")
    folders = ("val2014", "images/val2014")
