"""`pumice ask`: one answer to the terminal, or a file of questions to a file of answers."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pumice.cli import options
from pumice.errors import InputError
from pumice.files import replacing


def ask(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Pictures, if any, then the question.", metavar="[IMAGE]... QUESTION", show_default=False
        ),
    ] = None,
    model: options.Model = "pumice-tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='Answer many questions: one {"id", "image", "question"} per line.',
            metavar="IN.jsonl",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the answers of --batch go.", metavar="OUT.jsonl", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Questions of --batch answered at a time.")] = 8,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    device: options.Device = None,
    quantize: options.Quantize = options.Bits.auto,
    template: options.Template = None,
    tower: options.Tower = None,
    base: options.Base = None,
) -> None:
    """Ask a question about pictures, or without any.

    pumice ask dog.jpg "What is the dog doing?"
    """
    sampling = options.sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    opening = options.opening(device, quantize, template, tower, base)
    if batch is not None or out is not None:
        if words and batch is not None:
            raise InputError(f"--batch reads its questions from the file; leave out {words[-1]!r}")
        if out is None:
            raise InputError("--batch needs --out OUT.jsonl, where the answers go")
        if batch is None:
            raise InputError("--out belongs to --batch IN.jsonl; one answer goes to the terminal")
        _ask_batch(batch, out, model, opening, slots, as_json, sampling)
        return
    *images, question = words or [""]
    _check_question(images, question)
    for word in images:
        if not Path(word).exists() and not _is_picture(word) and "/" not in word:
            raise InputError(
                f"there is no picture {word!r}; if it belongs to the question, put the question in quotes: "
                'pumice ask dog.jpg "What is this?"'
            )
    _ask_one(images, question, model, opening, as_json, sampling)


def _check_question(images: list[str], question: str) -> None:
    from pumice.conversation import Conversation, user_message

    if not question.strip():
        raise InputError('there is no question; write for example: pumice ask dog.jpg "What is this?"')
    if _is_picture(question):
        raise InputError(
            f"the last argument must be the question, but {question!r} is a picture; "
            f'write for example: pumice ask {question} "What is this?"'
        )
    Conversation((user_message(question, images),)).check(answered=False)


def _is_picture(text: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a long question is no possible file name
        if Path(text).is_file():
            return True
    endings = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    return text.lower().endswith(endings) and len(text.split()) == 1


def _ask_one(
    images: list[str],
    question: str,
    model: str,
    opening: dict[str, Any],
    as_json: bool,
    sampling: dict[str, Any],
) -> None:
    from pumice.images import open_image

    opened = [open_image(path) for path in images]  # before torch is imported: a wrong path is told at once
    options.share_cores()
    from pumice.assistant import load
    from pumice.conversation import Conversation, user_message

    assistant = load(model, **opening)
    reply = assistant.stream(Conversation((user_message(question, opened),)), **sampling)
    if as_json:
        answer = "".join(reply)
        found = {"model": model, "images": images, "question": question, "answer": answer}
        print(json.dumps({**found, "finish": reply.finish, "tokens": reply.tokens}, ensure_ascii=False))
        return
    for piece in reply:
        print(piece, end="", flush=True)
    print()


@dataclass(frozen=True)
class _Row:
    """A line of the input: either a question or what is wrong with the line."""

    id: Any
    images: tuple[str | Path, ...] = ()
    question: str = ""
    error: str = ""


def _ask_batch(
    source: Path,
    out: Path,
    model: str,
    opening: dict[str, Any],
    slots: int,
    as_json: bool,
    sampling: dict[str, Any],
) -> None:
    try:
        # Not splitlines: JSON text may hold other characters that it takes for line ends.
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(
            f"the questions '{source}' cannot be read: {error.strerror}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"'{source}' is not UTF-8 text; save it as UTF-8") from error
    rows = [_read_row(line, number, source.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"'{source}' holds no questions; write one JSON object per line")
    if not out.parent.is_dir():
        raise InputError(f"the folder '{out.parent}' of --out does not exist; make it first")
    if out.exists() and (out.is_dir() or out.samefile(source)):
        raise InputError(f"--out '{out}' is a folder or the questions themselves; name another file")
    failed = 0
    partial = out.with_name(f"{out.name}.partial")
    answers = iter(_answers([row for row in rows if not row.error], partial, model, opening, slots, sampling))
    with replacing(out) as file:
        for row in rows:
            answer = InputError(row.error) if row.error else next(answers)
            wrong = isinstance(answer, InputError)
            failed += wrong
            line = {"id": row.id, "error" if wrong else "answer": str(answer)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.unlink(missing_ok=True)
    if as_json:
        print(
            json.dumps({"rows": len(rows), "answered": len(rows) - failed, "errors": failed, "out": str(out)})
        )
    elif failed:
        print(f"pumice: {failed} of {len(rows)} rows have an error instead of an answer", file=sys.stderr)
    if failed == len(rows):  # without a single answer the work has failed
        raise typer.Exit(1)


def _answers(
    rows: list[_Row], partial: Path, model: str, opening: dict[str, Any], slots: int, sampling: dict[str, Any]
) -> list[str | InputError]:
    """The answers to sound rows; they stand in `partial` as they come, where a stopped run goes on."""
    if not rows:
        return []
    options.share_cores()
    from pumice.answers import AnswerFile
    from pumice.assistant import load
    from pumice.engine.sampling import SamplingParams

    SamplingParams(**sampling)  # raises before the model is loaded
    assistant = load(model, **opening)
    given = [(list(row.images), row.question) for row in rows]
    with AnswerFile(partial, given, {"model": model, **opening, **sampling}) as file:
        if done := len(file.answers):
            print(f"pumice: {done} of {len(rows)} answers stand in '{partial}' already", file=sys.stderr)
        for answer in assistant.ask_each(given[done:], slots=slots, **sampling):
            file.add(answer)
            if sys.stderr.isatty():
                print(f"\r{len(file.answers)} of {len(rows)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return file.answers


def _read_row(line: str, number: int, folder: Path) -> _Row:
    """One line. A relative picture is looked for beside the file, then where the command runs."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Row(number, error=f"line {number} is not JSON ({error})")
    if not isinstance(values, dict):
        return _Row(number, error=f"line {number} is not an object with 'id' and 'question'")
    row_id = values.get("id", number)
    if "image" not in values:
        for key in values:  # answering without the picture that such a key means would go unnoticed
            if difflib.get_close_matches(key, ("image", "picture", "photo"), n=1):
                return _Row(row_id, error=f"unknown key {key!r}; write 'image'")
    image, question = values.get("image"), values.get("question")
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return _Row(row_id, error="'image' must be a path or a list of paths")
    if not isinstance(question, str):
        return _Row(row_id, error="'question' is missing or not text")
    beside = [folder / name for name in names]
    return _Row(row_id, tuple(b if b.exists() else n for b, n in zip(beside, names, strict=True)), question)
