"""`pumice ask`: answer one question in the terminal, or a file of questions into a file of answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pumice.cli import options, reading
from pumice.errors import CAUSE, InputError, counted, near, shorten, wrong_input
from pumice.files import replacing
from pumice.jsonl import AnswerFile, json_fault, json_text, parse_json, print_json, wrong_json
from pumice.media import PICTURES
from pumice.progress import LOG_SECONDS, ProgressBar

SLOTS = 8  # of --batch
DRAWN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of --out, and Pillow's names


@options.expand
def ask(
    arguments: Annotated[
        list[str] | None, Argument(help="Pictures, if any, then the question.", metavar="[IMAGE]... QUESTION")
    ] = None,
    model: options.Model = "pumice-tiny",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    batch: Annotated[
        Path | None,
        Option(
            help='Answer many questions: one {"id", "image", "video", "question"} per line.',
            metavar="IN.jsonl",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            help="Where the answers of --batch go; or, of one answer, the picture with its boxes.",
            metavar="OUT",
        ),
    ] = None,
    frames: options.VideoFrames = None,
    slots: Annotated[
        int | None, Option(min=1, help=f"Questions of --batch answered at a time; {SLOTS} if not given.")
    ] = None,
    *,
    sampling: options.Sampling,
    opening: options.Opening,
) -> None:
    """Ask a question about pictures, or without any.

    pumice ask dog.jpg "What is the dog doing?"
    """
    asking = _Asking(model, opening, sampling.given(), frames, as_json)
    if batch is not None:
        if arguments:
            raise InputError(f"--batch reads its questions from the file; leave out {arguments[-1]!r}")
        if out is None:
            raise InputError("--batch needs --out OUT.jsonl, where the answers go")
        _ask_batch(batch, out, asking, slots or SLOTS)
        return
    if slots is not None:
        raise InputError("--slots is for the questions of --batch; add --batch, or leave it out")
    *images, question = arguments or [""]
    _check_question(images, question)
    for path in images:
        if not os.path.exists(path) and not _is_image_path(path) and "/" not in path:
            raise InputError(
                f"there is no picture or video {path!r}; if it belongs to the question, put the question in "
                'quotes: pumice ask dog.jpg "What is this?"'
            )
    if out is not None:
        _check_drawing(out, images)
    _ask_one(images, question, asking, out)


@dataclass(frozen=True)
class _Asking:
    """What one question and a batch have in common. frames: of each video."""

    model: str
    opening: options.Opening
    sampling: dict[str, Any]
    frames: int | None
    as_json: bool


def _check_question(images: list[str], question: str) -> None:
    from pumice.conversation import Conversation, question_message

    if not question.strip():
        raise InputError('there is no question; write for example: pumice ask dog.jpg "What is this?"')
    if _is_image_path(question):
        raise InputError(
            f"the last argument must be the question, but {question!r} is a picture; "
            f'write for example: pumice ask {question} "What is this?"'
        )
    message = question_message(question, images)
    if not message.text.strip():
        raise InputError("the question is empty; say what you want to know")
    Conversation((message,)).check(answered=False)


def _check_drawing(out: Path, images: list[str]) -> None:
    """Raise InputError unless the boxes of an answer can be drawn into `out`."""
    if out.suffix.lower() not in DRAWN:
        raise InputError(
            f"--out {out}: of one answer it is the picture with its boxes, named .png, .jpg or .webp; "
            "a file of answers belongs to --batch IN.jsonl"
        )
    if not images:
        raise InputError(f"--out {out} draws the boxes of an answer on its picture; show one")
    options.check_out(out, images, "the picture itself")


def _is_image_path(text: str) -> bool:
    if os.path.isfile(text):  # False for a long question, where Path.is_file raises
        return True
    return text.lower().endswith(PICTURES) and len(text.split()) == 1


def _open(path: str, frames: int | None) -> Any:
    """Return a picture, or a video: an animation is one only where frames are asked for."""
    from pumice.conversation import Video
    from pumice.images import is_animated, is_video, open_image

    shown = is_video(path) or (frames is not None and is_animated(path))
    return Video(path, frames) if shown else open_image(path)


def _videos(images: Iterable[Any]) -> int:
    """Return how many of what is shown are videos."""
    from pumice.conversation import Video

    return sum(isinstance(image, Video) for image in images)


def _check_frames(frames: int | None, images: Iterable[Any]) -> None:
    if frames is not None and not _videos(images):
        raise InputError("--frames is for a video or an animation, and none is shown; leave it out")


def _ask_one(images: list[str], question: str, asking: _Asking, out: Path | None) -> None:
    from pumice.conversation import Conversation, question_message

    # Before torch is imported, so that a wrong path fails at once.
    opened = [_open(path, asking.frames) for path in images]
    _check_frames(asking.frames, opened)
    if out is not None and _videos(opened[-1:]):
        raise InputError(f"--out {out} draws boxes on a picture, {images[-1]!r} is a video; leave it out")
    assistant = asking.opening.load_to_ask(asking.model, asking.sampling, pictures=bool(opened), shown=True)
    sees = assistant.model.config.vision.kind != "none"
    if sees and not images and not asking.as_json and sys.stdout.isatty():  # one may have been forgotten
        print("pumice: no picture is shown, so the answer is about none", file=sys.stderr)
    reply = assistant.stream(Conversation((question_message(question, opened),)), **asking.sampling)
    answer = ""
    for piece in reply if asking.as_json else reading.pieces(reply):
        answer += piece
        if not asking.as_json:
            print(piece, end="", flush=True)
    if asking.as_json:
        values = {"model": assistant.name, "images": images, "question": question, "answer": answer}
        print_json({**values, "finish": reply.finish, "tokens": reply.tokens})
    else:
        print()
    if out is not None:
        # Of several pictures, boxes are of the last. A model that knows videos counts no frame as a picture.
        shown = len(opened) - (0 if assistant.model.config.video is None else _videos(opened))
        count = len(assistant.boxes(opened[-1], answer, images=shown))
        with replacing(out) as file:
            drawn = assistant.draw(opened[-1], answer, images=shown)
            drawn.save(file.buffer, DRAWN[out.suffix.lower()])
        print(f"pumice: {out} shows the answer's boxes: {count}", file=sys.stderr)


@dataclass(frozen=True)
class _Row:
    """A line of the input: a question, or the error of the line."""

    id: Any
    images: tuple[Any, ...] = ()  # paths and videos
    question: str = ""
    error: str = ""
    unread: tuple[str, ...] = ()  # keys that say nothing here


_KEYS = ("id", "image", "video", "videos", "question")  # of a line


def _ask_batch(source: Path, out: Path, asking: _Asking, slots: int) -> None:
    # 1. Read all rows and check the paths, before the model is loaded.
    with (
        wrong_input(OSError, f"the questions '{source}' cannot be read: {CAUSE}; check the path"),
        wrong_input(UnicodeDecodeError, f"'{source}' is not UTF-8 text; save it as UTF-8"),
    ):
        text = source.read_text(encoding="utf-8-sig")
    numbered: Iterable[tuple[int, Any]]
    if text.lstrip().startswith("["):
        with wrong_json(f"the JSON list in '{source}' is malformed or cut off ({CAUSE}); fix the file"):
            kind, numbered = "row", enumerate(json.loads(text), 1)
    else:
        whole = parse_json(text)  # None of several lines
        if isinstance(whole, dict) and "question" not in whole:
            _refuse_nested(whole, source)
        # Not splitlines: it also splits at characters that JSON allows inside a text.
        lines = enumerate(text.split("\n"), 1)
        kind, numbered = "line", ((number, _parse(line)) for number, line in lines if line.strip())
    rows = [
        _read_row(values, number, f"{kind} {number}", source.parent, asking.frames)
        for number, values in numbered
    ]
    if not rows:
        raise InputError(f"'{source}' holds no questions; write a JSON list or one JSON object per line")
    _check_frames(asking.frames, [image for row in rows for image in row.images])
    options.check_out(out, [source], "the questions themselves")
    partial = out.with_name(f"{out.name}.partial")
    unread = dict.fromkeys(key for row in rows for key in row.unread)
    if unread:
        names = ", ".join(map(_named, unread))
        print(f"pumice: '{source}' has keys that are not read: {names}", file=sys.stderr)
    if out.exists() and not partial.exists():
        print(f"pumice: all rows are asked anew, and then '{out}' is replaced", file=sys.stderr)
    # 2. Answer the rows without an error. `partial` keeps the answers of a run that is stopped.
    valid_rows = [row for row in rows if not row.error]
    answers = iter(_answer_rows(valid_rows, partial, asking, slots))
    # 3. Write one line for every row, in the order of the input.
    failed, reason = 0, ""
    with replacing(out) as file:
        for row in rows:
            answer = InputError(row.error) if row.error else next(answers)
            is_error = isinstance(answer, InputError)
            if is_error:
                failed, reason = failed + 1, reason or f"with the id {shorten(row.id)}: {answer}"
            line = {"id": row.id, "error" if is_error else "answer": str(answer)}
            file.write(json_text(line) + "\n")
    partial.unlink(missing_ok=True)
    if asking.as_json:
        print_json({"rows": len(rows), "answered": len(rows) - failed, "errors": failed, "out": str(out)})
    elif failed:
        message = f"pumice: {counted(failed, 'row', 'have', of=len(rows))} an error instead of an answer"
        print(f"{message}, the first {reason}", file=sys.stderr)
    if failed == len(rows):  # no row has an answer: the work has failed
        raise typer.Exit(1)


def _answer_rows(rows: list[_Row], partial: Path, asking: _Asking, slots: int) -> list[str | InputError]:
    """Return the answer or the error of each row. A stopped run continues from the answers in `partial`."""
    from pumice.engine.params import SamplingParams

    if not rows:
        return []
    assistant = asking.opening.load_to_ask(asking.model, asking.sampling)
    # The file says with what it was asked in full.
    whole = SamplingParams.options(assistant.generation, asking.sampling)
    questions = [(list(row.images), row.question) for row in rows]
    asked = {"model": asking.model, "frames": asking.frames, **asking.opening.arguments(), **whole}
    with AnswerFile(partial, questions, asked) as file, ProgressBar(log_seconds=LOG_SECONDS) as bar:
        if done := len(file.answers):
            ready = counted(done, "answer", "are", of=len(rows))
            print(f"pumice: {ready} in '{partial}' already", file=sys.stderr)
        for answer in assistant.ask_each(questions[done:], slots=slots, **asking.sampling):
            file.add(answer)
            bar.show(len(file.answers), len(rows), "answer")
    return file.answers


def _refuse_nested(whole: dict[str, Any], source: Path) -> None:
    """Raise InputError where the rows stand inside of one object."""
    for key, value in whole.items():
        inner = value if isinstance(value, list) else [value]
        if any(isinstance(row, dict) for row in inner):
            raise InputError(
                f"'{source}' is one JSON object, with rows in its {shorten(key)}; write a JSON list of rows, "
                "or one row per line"
            )


def _parse(line: str) -> Any:
    """Return the value of a line of JSON, or the error of one that is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _read_row(values: Any, number: int, label: str, folder: Path, frames: int | None) -> _Row:
    """Read one row. A relative path is searched in `folder`, then in the working folder.

    values: of the row, or the error of its line. number: its id where it has none. label: what messages
    call it. frames: of each video.
    """
    from pumice.conversation import Video, check_media
    from pumice.data.pictures import beside

    if isinstance(values, ValueError | RecursionError):
        return _Row(number, error=f"{label} is not JSON ({json_fault(values)})")
    if not isinstance(values, dict):
        return _Row(number, error=f"{label} is not an object with 'id' and 'question'")
    row_id = values.get("id", number)
    question = values.get("question")
    try:
        check_media(values, label)
        shown: list[Any] = _paths(values, "image", folder)
        videos = _paths(values, "video", folder) or _paths(values, "videos", folder)
        if not isinstance(question, str):
            return _Row(row_id, error="'question' is missing or not text")
        if videos:
            shown, question = beside(shown, [Video(path, frames) for path in videos], question)
    except InputError as error:
        return _Row(row_id, error=str(error))
    return _Row(row_id, tuple(shown), question, unread=tuple(key for key in values if key not in _KEYS))


def _named(key: str) -> str:
    """Return a key that is not read, with the one that it may mean."""
    meant = near(key, _KEYS)
    return shorten(key) + (f" (did you mean {meant!r}?)" if meant else "")


def _paths(values: dict[str, Any], key: str, folder: Path) -> list[str | Path]:
    """Return the paths that a row has under a key. Raises InputError where anything else stands there."""
    value = values.get(key)
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise InputError(f"{key!r} must be a path or a list of paths")
    return [found if os.path.exists(found := folder / path) else path for path in paths]
