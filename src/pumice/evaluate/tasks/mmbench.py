"""MMBench and MMBench-CN (arXiv 2307.06281): choices in every rotation, right only if all are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pumice.errors import InputError, library
from pumice.evaluate.files import OPTION_COLUMNS, base64_image, hidden_options, options, read_rows
from pumice.evaluate.metrics.choice import infer_option
from pumice.evaluate.task import (
    LETTER,
    Answered,
    Question,
    Score,
    Task,
    add_unread,
    mean_percent,
    mean_score,
    mean_statistic,
    options_note,
)

ROTATION = 1_000_000  # a rotated copy has its question's index plus a multiple of this
MAX_CELL = 32_767  # characters that a cell of a workbook holds
MAX_REFERENCE = 64  # characters; a shorter "image" is the index of the row that holds the image


class MMBench(Task):
    """Headline: circular accuracy. VLMEvalKit's rules read the letter; an answer they cannot read is wrong.

    MMBench's server lets a language model read such answers, so its numbers can be higher for models that
    answer in sentences.
    """

    name = "mmbench"
    title = "MMBench"
    max_new_tokens = 16
    instruction = LETTER
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "dev": ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
        "test": ("mmbench_test_20230712.tsv", "mmbench_test_en_20231003.tsv", "MMBench_TEST_EN.tsv"),
    }

    def questions(self, data: Path) -> Iterator[Question]:
        file = self.locate(data, *self.files[self.split])
        # A rotated copy holds no image but the index of the row that does.
        image_data: dict[str, str] = {}
        for number, row in enumerate(read_rows(file, texts=("question", *OPTION_COLUMNS)), 1):
            index, text, image = row.get("index"), row.get("question"), row.get("image")
            if index is None or text is None or image is None or not index.isdecimal():
                raise InputError(
                    f"'{file}', row {number}: 'index', 'question' or 'image' is missing; "
                    "is this the official file?"
                )
            if len(image) <= MAX_REFERENCE and image in image_data:
                image = image_data[image]
            elif int(index) < ROTATION:
                image_data[index] = image
            # The official scripts stop at an option such as "None", which pandas reads as no value. Here
            # every option in the table is shown.
            choices = options(row)
            hint = row.get("hint")
            full_text = text if hint is None or hint.lower() in ("nan", "none") else f"{hint}\n{text}"
            lines = [
                full_text,
                *(f"{letter}. {option}" for letter, option in choices.items()),
                self.instruction,
            ]
            group = str(int(index) % ROTATION)
            meta = {
                "question": text,
                "choices": choices,
                "answer": row.get("answer"),
                "category": row.get("l2-category"),
                "ability": row.get("category"),
                "group": group,
                "row": row | {"image": None},
                "hidden": hidden_options(row),
            }
            yield Question(index, (base64_image(group, image),), "\n".join(lines), meta)

    def score(self, answered: Sequence[Answered]) -> Score:
        if answered and all(question.meta["answer"] is None for question, _ in answered):
            raise self.not_public("https://mmbench.opencompass.org.cn", "FILE.xlsx")
        letters = [infer_option(text, question.meta["choices"]) for question, text in answered]
        truths = [question.meta["answer"] for question, _ in answered]
        right = [float(letter == truth) for letter, truth in zip(letters, truths, strict=True)]
        groups: dict[str, list[float]] = {}
        for (question, _), hit in zip(answered, right, strict=True):
            groups.setdefault(question.meta["group"], []).append(hit)
        # The first rotation in the file carries the circular score; the others have none.
        uncounted = dict(groups)
        circular_values = [
            float(all(hits)) if (hits := uncounted.pop(question.meta["group"], None)) else None
            for question, _ in answered
        ]
        first = [a for a, b in zip(answered, circular_values, strict=True) if b is not None]
        circular = [b for b in circular_values if b is not None]
        vanilla = [hit for (q, _), hit in zip(answered, right, strict=True) if int(q.id) < ROTATION]
        notes = options_note(answered)
        if len(groups) == len(answered):
            notes.append("no question was asked in another rotation: this is not circular evaluation")
        categories = {"ability (l2)": "category", "ability": "ability"}
        score = mean_score(first, {"accuracy": circular}, categories, notes)
        score.metrics["accuracy_every_rotation"] = mean_percent(right)
        score.metrics["accuracy_first_order"] = mean_percent(vanilla)
        add_unread(score, letters.count(None), "name no option by the rules, which counts as wrong")
        score.values, score.statistic = list(right), mean_statistic(circular_values)
        return score

    def submission(self, answered: Sequence[Answered], path: Path, data: Path) -> None:
        """Write the server's workbook: the table without images, and a column of predictions."""
        if not answered:
            raise InputError(f"there are no answers to {self.title} to write")
        dropped = ("hint", "category", "source", "image", "comment", "l2-category", "split")
        columns = [name for name in answered[0].question.meta["row"] if name not in dropped]
        columns = [*columns[:6], "prediction", *columns[6:]]
        xlsx = library("xlsxwriter", "a workbook needs XlsxWriter", "eval")
        with xlsx.Workbook(path, {"strings_to_formulas": False, "strings_to_urls": False}) as book:
            sheet = book.add_worksheet("Sheet1")
            sheet.write_row(0, 0, columns)
            for number, (question, text) in enumerate(answered, 1):
                row = {**question.meta["row"], "prediction": text, "index": int(question.id)}
                for column, name in enumerate(columns):
                    value = row[name]
                    sheet.write(number, column, value[:MAX_CELL] if isinstance(value, str) else value)


class MMBenchCN(MMBench):
    """The same questions in Chinese."""

    name = "mmbench-cn"
    title = "MMBench-CN"
    instruction = "请直接回答选项字母。"
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "dev": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
        "test": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
    }
