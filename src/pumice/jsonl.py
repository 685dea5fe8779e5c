"""JSON in one line: printed for programs, and as files with one line per row, so that a run can continue."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Generic, TypeVar

from pumice.errors import CAUSE, InputError, wrong_input
from pumice.files import appending, hold, whole_lines

T = TypeVar("T")


def json_text(values: Any, encoding: str | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Return values as one line of JSON that a stream of this encoding leaves as they are.

    encoding: None is UTF-8, the encoding of JSON. In another one, whatever is not ASCII is escaped, and so
    are halves of surrogate pairs, which no encoding has. default: as for `json.dumps`.
    """
    if codecs.lookup(encoding or "utf-8").name == "utf-8":
        text = json.dumps(values, ensure_ascii=False, default=default)
        with contextlib.suppress(UnicodeEncodeError):
            text.encode()
            return text
    return json.dumps(values, default=default)


def print_json(values: Any) -> None:
    """Print values as one line of JSON, the same whatever the code page of the terminal is."""
    print(json_text(values, sys.stdout.encoding))


def is_cut_off(line: str) -> bool:
    """Return whether a last line without an end may be part of an object, which a crash cut off."""
    return line.startswith("{") or not line.strip("\0")  # a power cut may leave zeros


def read_values(path: Path, read: Callable[[int, Any], T]) -> list[T]:
    """Return read(number from 0, value) of each complete line of a file; a value of None is no JSON.

    A last line without an end counts if it is an object or a list. Raises InputError if it is no part of one.
    """
    lines = whole_lines(path)
    last = path.read_bytes().decode("utf-8", errors="replace").rpartition("\n")[2]
    if isinstance(parse_json(last), dict | list):
        lines.append(last)
    elif last and not is_cut_off(last):
        raise InputError(
            f"'{path}', line {len(lines) + 1} is no object, so the file is another one; name another file or "
            "remove it"
        )
    return [read(number, parse_json(line)) for number, line in enumerate(lines)]


def parse_json(text: str | bytes) -> Any:
    """Return a JSON value, or None where the text is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# How Python's messages begin, and what they mean.
_FAULTS = {
    "Expecting ',' delimiter": "a comma or a closing bracket is missing",
    "Expecting ':' delimiter": "a colon is missing behind a key",
    "Expecting property name": "a key in double quotes is missing",
    "Illegal trailing comma": "a comma follows the last value",
    "Expecting value": "a value is missing",
    "Unterminated string": "a text has no closing quote",
    "Invalid control character": "a text holds a line break or another control character",
    "Invalid \\": "a backslash in a text begins no known character; write two",
    "Extra data": "more follows behind the end",
}


def json_fault(error: ValueError | RecursionError) -> str:
    """Say in plain words what `json.loads` found wrong, without the place."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "too many brackets stand inside each other"
    if not isinstance(error, json.JSONDecodeError):  # Python's advice is to raise its limit of digits
        return "a number has too many digits" if "digits" in str(error) else str(error)
    if error.pos >= len(error.doc.rstrip()):
        return "it ends too early"
    return next((fault for begin, fault in _FAULTS.items() if error.msg.startswith(begin)), error.msg)


@contextlib.contextmanager
def wrong_json(sentence: str, *, one_row: bool = False) -> Iterator[None]:
    """Turn errors of `json.loads` into an InputError with this sentence; CAUSE in it stands for the fault.

    one_row: the text is a row, whose number the sentence has, so no line is told.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        fault = json_fault(error)
        if isinstance(error, json.JSONDecodeError) and not (one_row and error.lineno > 1):
            line = "" if one_row else f"line {error.lineno}, "
            fault = f"{line}column {error.colno}: {fault}"
        raise InputError(sentence.replace(CAUSE, fault)) from error


class ResumableFile(Generic[T]):
    """A file to which a run appends a line per row. values: what `read` made of the lines of earlier runs.

    read: see `read_values`; it raises InputError where another line belongs. A last line that a crash cut
    off is removed; if only its end is missing, it is added. Raises InputError when the file cannot be written
    or another process holds it.
    """

    def __init__(self, path: str | PathLike[str], read: Callable[[int, Any], T]) -> None:
        self.path = Path(path)
        with wrong_input(OSError, f"'{path}' cannot be written: {CAUSE}; name another file"):
            self._lock = hold(self.path, f"writing the file '{path}'")
        try:
            self.values = read_values(self.path, read)
            if len(self.values) > len(whole_lines(self.path)):
                with self.path.open("ab") as file:
                    file.write(b"\n")
            self._file = appending(self.path)
        except BaseException:
            self._lock.release()
            raise

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line. It is handed to the system at once, so that a kill loses at most one."""
        self._file.write(json_text(row) + "\n")
        self._file.flush()

    def __enter__(self) -> ResumableFile[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()


class AnswerFile(ResumableFile["str | InputError"]):
    """The file of the answers to `rows`. answers: those of earlier runs, in order, then those added.

    asked: the settings of the questions (sampling, for example), written to every line. Raises InputError,
    also when the file's lines belong to other rows or other settings.
    """

    def __init__(self, path: str | PathLike[str], rows: Sequence[Any], asked: Mapping[str, Any]) -> None:
        self.rows = rows
        self.asked = json.loads(json.dumps(asked, default=list))  # as it reads back from a line
        super().__init__(path, self._answer)
        self.answers = self.values

    def __enter__(self) -> AnswerFile:
        return self

    def add(self, answer: str | InputError) -> str | InputError:
        """Write the next row's answer, and return it."""
        kind = "error" if isinstance(answer, InputError) else "answer"
        asked = {"asked": self.asked} if self.asked else {}
        self.write({**_name(self.rows[len(self.answers)]), kind: str(answer), **asked})
        self.answers.append(answer)
        return answer

    def _answer(self, number: int, values: Any) -> str | InputError:
        expected_row = _name(self.rows[number]) if number < len(self.rows) else None
        try:
            line_row = {"images": values["images"], "question": values["question"]}
            answer = values["answer"] if "answer" in values else InputError(values["error"])
            asked = values.get("asked", {})
        except (KeyError, TypeError):
            line_row, answer, asked = None, "", {}
        if expected_row is None or line_row != expected_row:
            expected = "nothing" if expected_row is None else f"the answer to {expected_row['question']!r}"
            raise InputError(
                f"'{self.path}', line {number + 1}: {expected} belongs here; the file is of other rows, "
                "name another one or remove it"
            )
        # Settings that came later are absent in older files, and None where they do nothing.
        changed_keys = [key for key in {**asked, **self.asked} if asked.get(key) != self.asked.get(key)]
        if changed_keys:
            then, now = ({key: settings.get(key) for key in changed_keys} for settings in (asked, self.asked))
            raise InputError(
                f"'{self.path}', line {number + 1}: it was asked with {then}, now with {now}; "
                "ask as before, name another file or remove it"
            )
        return answer


def _name(row: Any) -> dict[str, Any]:
    """Return the part of a line that identifies its row."""
    from pumice.conversation import ImagePart

    if not isinstance(row, list | tuple) or len(row) != 2:
        return {"images": [], "question": repr(row)}
    images, question = row
    image_list = [] if images is None else images if isinstance(images, list | tuple) else [images]
    return {"images": [ImagePart(image).name for image in image_list], "question": str(question)}
