"""Answers in a file, one JSON line per row, so that asking can stop and go on.

Knows rows of (pictures, question) and their answers. Does not know: models.
"""

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
    """The file of the answers to `rows`. answers: those that it holds from before, in order.

    asked: how they are asked (sampling, say), told in every line. A line that was cut off is removed. Raises
    InputError when the file cannot be written, another process has it, or its lines are not of the first of
    these rows, asked like this.
    """

    def __init__(self, path: str | PathLike[str], rows: Sequence[Any], asked: Mapping[str, Any]) -> None:
        self.path, self.rows = Path(path), rows
        self.asked = json.loads(json.dumps(asked, default=list))  # as a line will give it back
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
        """Write the next row's answer, and give it back."""
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
        wanted = _name(self.rows[number]) if number < len(self.rows) else None
        try:
            values = json.loads(line)
            found = {"images": values["images"], "question": values["question"]}
            answer = values["answer"] if "answer" in values else InputError(values["error"])
            asked = values.get("asked", {})
        except (ValueError, KeyError, TypeError):
            found, answer, asked = None, "", {}
        if wanted is None or found != wanted:
            expected = "nothing" if wanted is None else f"the answer to {wanted['question']!r}"
            raise InputError(
                f"'{self.path}', line {number + 1}: {expected} belongs here; the file is of other rows, "
                "name another one or remove it"
            )
        if asked != self.asked:
            other = [key for key in {**asked, **self.asked} if asked.get(key) != self.asked.get(key)]
            then, now = ({key: known.get(key) for key in other} for known in (asked, self.asked))
            raise InputError(
                f"'{self.path}', line {number + 1}: it was asked with {then}, now with {now}; "
                "ask as before, name another file or remove it"
            )
        return answer


def _name(row: Any) -> dict[str, Any]:
    """What a line says of its row."""
    if not isinstance(row, list | tuple) or len(row) != 2:
        return {"images": [], "question": repr(row)}
    images, question = row
    given = [] if images is None else images if isinstance(images, list | tuple) else [images]
    return {"images": [ImagePart(image).name for image in given], "question": str(question)}
