"""MME (arXiv 2306.13394): two yes/no questions per picture, in ten perception and four cognition tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pumice.errors import InputError
from pumice.evaluate.files import ImageFolders
from pumice.evaluate.task import SHORT, Answered, CategoryScore, DatasetSource, Floats, Question, Score, Task
from pumice.files import replacing

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."
PICTURES = (".jpg", ".png", ".jpeg")


def read_yes_no(text: str) -> str:
    """MME's calculation.py: yes or no among the first four characters, else "other"."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


class MME(Task):
    """Headline: the sum over the perception tasks of accuracy and of accuracy+ (both of a picture right)."""

    name = "mme"
    title = "MME"
    headline = "perception"
    unit = "points"
    rank = 7
    splits = ("test",)
    max_new_tokens = 16
    source = DatasetSource(
        url="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        version="MME_Benchmark_release_version (2,374 questions)",
        licence="for academic research only; on request from its authors",
        layout=(
            "MME_Benchmark_release_version/TASK/ with NAME.jpg and NAME.txt, or images/ and "
            "questions_answers_YN/ in it",
        ),
        sizes={"test": 2374},
    )

    def questions(self, data: Path) -> Iterator[Question]:
        root = next((d for d in (data / "MME_Benchmark_release_version", data) if d.is_dir()), data)
        known = [name for name in (*PERCEPTION, *COGNITION) if (root / name).is_dir()]
        if not known:
            raise InputError(f"none of MME's tasks is in '{root}'; expected {self.source.expected_files}")
        for name in known:
            folder = root / name
            split = (folder / "images").is_dir()
            texts = folder / "questions_answers_YN" if split else folder
            for file in sorted(texts.glob("*.txt")):
                picture = f"{name}/images/{file.stem}" if split else f"{name}/{file.stem}"
                yield from self._of_picture(name, file, ImageFolders(root), picture)

    def _of_picture(self, name: str, file: Path, pictures: ImageFolders, picture: str) -> Iterator[Question]:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            question, tab, truth = line.strip().rpartition("\t")
            if not tab or truth.lower() not in ("yes", "no"):
                raise InputError(f"'{file}', line {number}: expected a question, a tab, and Yes or No")
            asked = question.replace(YES_OR_NO, "").strip()
            image = pictures.get(*(picture + ending for ending in PICTURES))
            meta: dict[str, Any] = {
                "question": question,
                "answer": truth.lower(),
                "category": name,
                "group": f"{name}/{file.stem}",
                "file": file.name,
            }
            key = f"{name}/{file.stem}"
            yield Question(f"{key}/{number}", (image,), f"{asked}\n{SHORT}", meta, llava_id=key)

    def score(self, answered: Sequence[Answered]) -> Score:
        truths = [question.meta["answer"] for question, _ in answered]
        said = [read_yes_no(text) for _, text in answered]
        right = np.array([a == b for a, b in zip(said, truths, strict=True)], dtype=np.float64)
        tasks = np.array([question.meta["category"] for question, _ in answered])
        members: dict[str, list[int]] = {}
        for number, (question, _) in enumerate(answered):
            members.setdefault(question.group, []).append(number)
        both = np.zeros(len(answered))  # at the first question of a picture: whether all of its are right
        first = np.zeros(len(answered))
        for numbers in members.values():
            first[numbers[0]] = 1
            both[numbers[0]] = right[numbers].all()

        def parts(name: str, w: Floats) -> tuple[float, float]:
            w = w * (tasks == name)
            questions, pictures = w.sum(), (w * first).sum()
            if not questions or not pictures:
                return 0.0, 0.0
            return 100 * float((w * right).sum() / questions), 100 * float((w * both).sum() / pictures)

        def total(names: Sequence[str], w: Floats) -> float:
            return float(sum(sum(parts(name, w)) for name in names))

        ones = np.ones(len(answered))
        there = [name for name in (*PERCEPTION, *COGNITION) if (tasks == name).any()]
        counts = {name: int((tasks == name).sum()) for name in there}
        cells = {
            kind: {
                name: CategoryScore(sum(parts(name, ones)), counts[name]) for name in there if name in names
            }
            for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        metrics = {"perception": total(PERCEPTION, ones), "cognition": total(COGNITION, ones)}
        metrics["other"] = float(sum(reply == "other" for reply in said))
        for name in there:
            metrics[f"accuracy_{name}"], metrics[f"accuracy_plus_{name}"] = parts(name, ones)
        odd = sum(len(numbers) != 2 for numbers in members.values())
        notes = [f"{odd} pictures do not have two questions answered"] if odd else []
        if absent := [name for name in PERCEPTION if name not in there]:
            notes.append(f"without {', '.join(absent)}: their points are missing from the sum")
        return Score(
            metrics, {k: v for k, v in cells.items() if v}, list(right.tolist()),
            statistic=lambda w: total(PERCEPTION, w), notes=notes,
        )  # fmt: skip

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """A folder with one TASK.txt each, as MME's calculation.py reads it."""
        path.mkdir(parents=True, exist_ok=True)
        lines: dict[str, list[str]] = {}
        for question, text in answered:
            said = " ".join(text.split())  # a tab or a line end would break the file
            row = (
                question.meta["file"],
                question.meta["question"],
                question.meta["answer"].capitalize(),
                said,
            )
            lines.setdefault(question.meta["category"], []).append("\t".join(row) + "\n")
        for name, rows in lines.items():
            with replacing(path / f"{name}.txt") as file:
                file.writelines(rows)
