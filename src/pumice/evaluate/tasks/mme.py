"""MME (arXiv 2306.13394): two yes/no questions per image, in ten perception and four cognition tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.errors import InputError, counted
from pumice.evaluate.files import ImageFolders
from pumice.evaluate.task import SHORT, Answered, CategoryScore, Floats, Question, Score, Task
from pumice.files import replacing

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."
SUFFIXES = (".jpg", ".png", ".jpeg")


def read_yes_no(text: str) -> str:
    """Return yes or no if it is among the first four characters, else "other" (MME's calculation.py)."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


class MME(Task):
    """Headline: the sum, over the perception tasks, of accuracy and accuracy+ (both answers right)."""

    name = "mme"
    title = "MME"
    headline = "perception"
    unit = "points"
    max_new_tokens = 16

    def questions(self, data: Path) -> Iterator[Question]:
        root = next((d for d in (data / "MME_Benchmark_release_version", data) if d.is_dir()), data)
        present = [name for name in (*PERCEPTION, *COGNITION) if (root / name).is_dir()]
        if not present:
            raise InputError(f"none of MME's tasks is in '{root}'; expected {self.source.expected_files}")
        for name in present:
            folder = root / name
            separate = (folder / "images").is_dir()
            texts = folder / "questions_answers_YN" if separate else folder
            for file in sorted(texts.glob("*.txt")):
                image_stem = f"{name}/images/{file.stem}" if separate else f"{name}/{file.stem}"
                yield from self._image_questions(name, file, ImageFolders(root), image_stem)

    def _image_questions(
        self, name: str, file: Path, images: ImageFolders, image_stem: str
    ) -> Iterator[Question]:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            question, tab, truth = line.strip().rpartition("\t")
            if not tab or truth.lower() not in ("yes", "no"):
                raise InputError(f"'{file}', line {number}: expected a question, a tab, and Yes or No")
            text = question.replace(YES_OR_NO, "").strip()
            image = images.get(*(image_stem + suffix for suffix in SUFFIXES))
            meta: dict[str, Any] = {
                "question": question,
                "answer": truth.lower(),
                "category": name,
                "group": f"{name}/{file.stem}",
                "file": file.name,
            }
            key = f"{name}/{file.stem}"
            yield Question(f"{key}/{number}", (image,), f"{text}\n{SHORT}", meta, llava_id=key)

    def score(self, answered: Sequence[Answered]) -> Score:
        # 1. Read the answers, and group them by image.
        truths = [question.meta["answer"] for question, _ in answered]
        replies = [read_yes_no(text) for _, text in answered]
        right = np.array([a == b for a, b in zip(replies, truths, strict=True)], dtype=np.float64)
        tasks = np.array([question.meta["category"] for question, _ in answered])
        members: dict[str, list[int]] = {}
        for number, (question, _) in enumerate(answered):
            members.setdefault(question.group, []).append(number)
        both = np.zeros(len(answered))  # 1 at the first question of an image whose answers are all right
        first = np.zeros(len(answered))  # 1 at the first question of every image
        for numbers in members.values():
            first[numbers[0]] = 1
            both[numbers[0]] = right[numbers].all()

        # 2. Define the scores as functions of weights, for the bootstrap.
        def accuracies(name: str, w: Floats) -> tuple[float, float]:
            w = w * (tasks == name)
            questions, images = w.sum(), (w * first).sum()
            if not questions or not images:
                return 0.0, 0.0
            return 100 * float((w * right).sum() / questions), 100 * float((w * both).sum() / images)

        def total(names: Sequence[str], w: Floats) -> float:
            return float(sum(sum(accuracies(name, w)) for name in names))

        # 3. Compute them, and note what is missing.
        ones = np.ones(len(answered))
        present = [name for name in (*PERCEPTION, *COGNITION) if (tasks == name).any()]
        counts = {name: int((tasks == name).sum()) for name in present}
        cells = {
            kind: {
                name: CategoryScore(sum(accuracies(name, ones)), counts[name])
                for name in present
                if name in names
            }
            for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        metrics = {"perception": total(PERCEPTION, ones), "cognition": total(COGNITION, ones)}
        metrics["other"] = float(sum(reply == "other" for reply in replies))
        for name in present:
            metrics[f"accuracy_{name}"], metrics[f"accuracy_plus_{name}"] = accuracies(name, ones)
        incomplete = sum(len(numbers) != 2 for numbers in members.values())
        notes = (
            [f"{counted(incomplete, 'picture', 'do')} not have two questions answered"] if incomplete else []
        )
        if absent := [name for name in PERCEPTION if name not in present]:
            notes.append(f"without {', '.join(absent)}: their points are missing from the sum")
        return Score(
            metrics, {k: v for k, v in cells.items() if v}, list(right.tolist()),
            statistic=lambda w: total(PERCEPTION, w), notes=notes,
        )  # fmt: skip

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write a folder with one TASK.txt per task, as MME's calculation.py reads it."""
        path.mkdir(parents=True, exist_ok=True)
        lines: dict[str, list[str]] = {}
        for question, text in answered:
            reply = " ".join(text.split())  # a tab or a line end would break the file
            row = (
                question.meta["file"],
                question.meta["question"],
                question.meta["answer"].capitalize(),
                reply,
            )
            lines.setdefault(question.meta["category"], []).append("\t".join(row) + "\n")
        for name, rows in lines.items():
            with replacing(path / f"{name}.txt") as file:
                file.writelines(rows)
