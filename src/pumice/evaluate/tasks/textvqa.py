"""TextVQA (arXiv 1904.08920): questions that need the words written in an image.

A row of its files:

    {"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "what is the brand?",
     "answers": ["nokia", ...], ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pumice.errors import counted
from pumice.evaluate.files import ImageFolders, read_json, read_rows, search
from pumice.evaluate.metrics.vqa import textvqa_accuracy
from pumice.evaluate.task import SHORT, Answered, Question, Score, Task, mean_score


class TextVQA(Task):
    """Leave-one-out accuracy with M4C's answer processor and its errors; a second metric corrects them.

    LLaVA shows the model the words that an OCR system (Rosetta) read. They come from LLaVA's question file
    or from the benchmark's OCR file; without both files the prompt has no words, and the result notes it.
    """

    name = "textvqa"
    title = "TextVQA"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        words, prompts = self._words(data), self._prompts(data)
        images = ImageFolders(data, "train_images", "train_val_images/train_images")
        keys = ("image_id", "question_id", "question", "answers")
        for row in self.rows(data, "TextVQA_0.5.1_val.json", keys=keys, at="data"):
            image, question = row["image_id"], row["question"]
            prompt = prompts.get((image, question.lower()))
            if prompt is None:
                tokens = words.get(image)
                hint = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens)}"
                prompt = f"{question}{hint}\n{SHORT}"
            meta = {"question": question, "answers": row["answers"], "ocr": "Reference OCR token" in prompt}
            key = str(row["question_id"])
            yield Question(key, (images.get(f"{image}.jpg", f"{image}.png"),), prompt, meta, llava_id=image)

    def _words(self, data: Path) -> dict[str, list[str]]:
        file = search(data, ("TextVQA_Rosetta_OCR_v0.2_val.json",))
        rows = read_json(file, "data")["data"] if file is not None else []
        return {row["image_id"]: list(row["ocr_tokens"]) for row in rows}

    def _prompts(self, data: Path) -> dict[tuple[str, str], str]:
        file = search(data, ("llava_textvqa_val_v051_ocr.jsonl",))
        rows = read_rows(file, "question_id", "text") if file is not None else []
        return {(str(row["question_id"]), row["text"].split("\n")[0].lower()): row["text"] for row in rows}

    def score(self, answered: Sequence[Answered]) -> Score:
        pairs = [(text, question.meta["answers"]) for question, text in answered]
        metrics = {
            name: [textvqa_accuracy(text, truths, corrected=corrected) for text, truths in pairs]
            for name, corrected in (("accuracy", False), ("accuracy_corrected", True))
        }
        without_words = sum(not question.meta["ocr"] for question, _ in answered)
        notes = ["the headline keeps the slips of M4C's answer processor, as published numbers do"]
        if without_words:
            notes.append(
                f"{counted(without_words, 'prompt', 'are')} without OCR words, since no OCR file is in the "
                "folder; LLaVA's "
                "numbers are with them (this matters only for answers made with these prompts)"
            )
        return mean_score(answered, metrics, notes=notes)
