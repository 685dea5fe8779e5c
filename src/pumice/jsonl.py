"""Answers in a JSON Lines file, one line per row, so that an interrupted run can continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pumice.conversation import ImagePart
from pumice.errors import InputError
from pumice.files import appending, hold_file, whole_lines


class AnswerFile:
    """The file of the answers to `rows`. answers: those of earlier runs, in order, then those added.

    asked: the settings of the questions (sampling, for example), written to every line. An incomplete last
    line is removed. Raises InputError when the file cannot be written, another process holds it, or its lines
    belong to other rows or other settings.
    """

    def __init__(self, path: str | PathLike[str], rows: Sequence[Any], asked: Mapping[str, Any]) -> None:
        self.path, self.rows = Path(path), rows
        self.asked = json.loads(json.dumps(asked, default=list))  # as it reads back from a line
        self.answers: list[str | InputError] = []
        try:
            self._lock = hold_file(self.path)
        except OSError as error:
            raise InputError(f"'{path}' cannot be written: {error.strerror}; name another file") from error
        try:
            self._read()
            self._file = appending(self.path)
        except BaseException:
            self._lock.release()
            raise

    def add(self, answer: str | InputError) -> str | InputError:
        """Write the next row's answer, and return it."""
        kind = "error" if isinstance(answer, InputError) else "answer"
        line = {**_name(self.rows[len(self.answers)]), kind: str(answer)}
        if self.asked:
            line["asked"] = self.asked
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        self.answers.append(answer)
        return answer

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    def _read(self) -> None:
        for number, line in enumerate(whole_lines(self.path)):
            self.answers.append(self._answer(number, line))

    def _answer(self, number: int, line: str) -> str | InputError:
        expected_row = _name(self.rows[number]) if number < len(self.rows) else None
        try:
            values = json.loads(line)
            line_row = {"images": values["images"], "question": values["question"]}
            answer = values["answer"] if "answer" in values else InputError(values["error"])
            asked = values.get("asked", {})
        except (ValueError, KeyError, TypeError):
            line_row, answer, asked = None, "", {}
        if expected_row is None or line_row != expected_row:
            expected = "nothing" if expected_row is None else f"the answer to {expected_row['question']!r}"
            raise InputError(
                f"'{self.path}', line {number + 1}: {expected} belongs here; the file is of other rows, "
                "name another one or remove it"
            )
        if asked != self.asked:
            changed_keys = [key for key in {**asked, **self.asked} if asked.get(key) != self.asked.get(key)]
            then, now = ({key: settings.get(key) for key in changed_keys} for settings in (asked, self.asked))
            raise InputError(
                f"'{self.path}', line {number + 1}: it was asked with {then}, now with {now}; "
                "ask as before, name another file or remove it"
            )
        return answer


def _name(row: Any) -> dict[str, Any]:
    """Return the part of a line that identifies its row."""
    if not isinstance(row, list | tuple) or len(row) != 2:
        return {"images": [], "question": repr(row)}
    images, question = row
    image_list = [] if images is None else images if isinstance(images, list | tuple) else [images]
    return {"images": [ImagePart(image).name for image in image_list], "question": str(question)}
