"""Asks a benchmark's questions and keeps the answers: predictions.jsonl, one line each, appended.

A run that was stopped goes on where it was, and ends with the same file as one that ran through.
Questions about one picture are asked together. Under torchrun each process asks its part; the parts
are joined in order. Knows: tasks and files. Does not know: models; an Answerer is all it needs.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from pumice.errors import InputError
from pumice.evaluate.endpoint import ChatEndpoint, with_images
from pumice.evaluate.task import Question, Task
from pumice.files import appending, hold_file, replacing, whole_lines

Progress = Callable[[int, int], None]  # (answered, of)


class Answerer(Protocol):
    """Whatever answers: questions in, answers out in the same order, taken as they are needed."""

    name: str

    def answer(self, questions: Iterable[Question], max_new_tokens: int) -> Iterator[str | InputError]:
        """What is wrong with a question stands in its answer's place."""
        ...


class BatchAssistant(Protocol):
    """The part of `pumice.Assistant` that is used."""

    def ask_each(
        self, rows: Iterable[tuple[Any, str]], *, slots: int = 8, **sampling: Any
    ) -> Iterator[str | InputError]: ...


class LocalAnswerer:
    """A model in this process, greedy."""

    def __init__(self, assistant: BatchAssistant, name: str, slots: int = 16) -> None:
        self.assistant, self.name, self.slots = assistant, name, slots

    def answer(self, questions: Iterable[Question], max_new_tokens: int) -> Iterator[str | InputError]:
        order: deque[InputError | None] = deque()  # of the questions taken: what keeps one from being asked

        def rows() -> Iterator[tuple[Any, str]]:
            for question in questions:
                try:
                    images = [picture.source() for picture in question.images]
                except InputError as error:
                    order.append(error)
                else:
                    order.append(None)
                    yield images or None, question.prompt

        for answer in self.assistant.ask_each(rows(), slots=self.slots, max_new_tokens=max_new_tokens):
            while (error := order.popleft()) is not None:
                yield error
            yield answer
        yield from (error for error in order if error is not None)


class EndpointAnswerer:
    """A model behind an OpenAI-compatible address: vLLM, a hosted model, `pumice serve`."""

    def __init__(self, endpoint: ChatEndpoint, workers: int = 8) -> None:
        self.endpoint, self.workers, self.name = endpoint, workers, endpoint.model

    def answer(self, questions: Iterable[Question], max_new_tokens: int) -> Iterator[str | InputError]:
        def ask(question: Question) -> str | InputError:
            try:
                images = [picture.source() for picture in question.images]
                content = with_images(question.prompt, images) if images else question.prompt
                return self.endpoint.chat(content, temperature=0.0, max_tokens=max_new_tokens)[0]
            except InputError as error:
                return error

        waiting: deque[Future[str | InputError]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for question in questions:
                    waiting.append(pool.submit(ask, question))
                    if len(waiting) >= 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def in_order(questions: Sequence[Question]) -> list[Question]:
    """The order of asking: pictures as they first appear, the questions of each together."""
    by_picture: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        key = tuple(picture.name for picture in question.images) or (f"\0{question.id}",)
        by_picture.setdefault(key, []).append(question)
    return [question for asked in by_picture.values() for question in asked]


def shard(questions: Sequence[Question], rank: int, world: int) -> list[Question]:
    """The part of one process: whole pictures, in order, about as many questions for each."""
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world} processes is none; check RANK and WORLD_SIZE")
    chosen: list[Question] = []
    last: object = None
    owner = 0
    for place, question in enumerate(questions):
        key = tuple(picture.name for picture in question.images) or question.id
        if key != last:
            owner, last = place * world // len(questions), key
        if owner == rank:
            chosen.append(question)
    return chosen


def processes() -> tuple[int, int]:
    """(this process, how many) as torchrun says it."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise InputError(f"RANK or WORLD_SIZE is no number ({error}); start with torchrun") from error


def check_images(questions: Sequence[Question], *, allow_missing: bool) -> int:
    """How many pictures are missing. Raises InputError that counts them, unless that is allowed."""
    seen: set[str] = set()
    missing: list[str] = []
    first = ""
    for question in questions:
        for picture in question.images:
            if picture.name in seen:
                continue
            seen.add(picture.name)
            if wrong := picture.wrong():
                missing.append(picture.name)
                first = first or wrong
    if missing and not allow_missing:
        raise InputError(
            f"{len(missing)} of {len(seen)} pictures are missing; the first: {first}; "
            "or add --allow-missing, and the result is marked as partial"
        )
    return len(missing)


def run(
    task: Task,
    questions: Sequence[Question],
    answerer: Answerer,
    path: Path,
    *,
    allow_missing: bool = False,
    progress: Progress | None = None,
    max_new_tokens: int | None = None,
) -> bool:
    """Answers all questions into `path`; True in the process that should go on with the whole file.

    max_new_tokens: another longest answer than the task's; every line then tells it.
    Raises InputError when the file is of another run, or a question cannot be asked and that is not
    allowed; what was answered stays.
    """
    rank, world = processes()
    ordered = in_order(questions)
    longest = max_new_tokens or task.max_new_tokens
    told = None if longest == task.max_new_tokens else longest
    if world > 1 and path.exists() and resume(path, ordered, answerer.name, told) == len(ordered):
        return rank == 0
    parts = [path if world == 1 else path.with_name(f"{path.name}.{r}-of-{world}") for r in range(world)]
    own = shard(ordered, rank, world)
    _check_folder(path)
    with hold_file(parts[rank]):
        done = resume(parts[rank], own, answerer.name, told)
        with appending(parts[rank]) as file:
            answers = answerer.answer(own[done:], longest)
            for number, (question, answer) in enumerate(zip(own[done:], answers, strict=True), done + 1):
                if isinstance(answer, InputError) and not allow_missing:
                    raise InputError(
                        f"question {question.id} of {task.name} cannot be asked: {answer}"
                    ) from answer
                file.write(row_of(question, answer, answerer.name, told))
                file.flush()
                if progress is not None:
                    progress(number, len(own))
    if world == 1:
        return True
    if rank != 0:
        return False
    _join(path, parts, [shard(ordered, r, world) for r in range(world)])
    return True


def row_of(question: Question, answer: str | InputError, model: str, longest: int | None = None) -> str:
    """A line of predictions.jsonl; longest: the longest answer in tokens, where it is not the task's."""
    said = {"error": str(answer)} if isinstance(answer, InputError) else {"answer": answer}
    row: dict[str, Any] = {"id": question.id, "prompt": question.prompt, **said, "model": model}
    row |= {} if longest is None else {"max_new_tokens": longest}
    return json.dumps(row, ensure_ascii=False) + "\n"


def resume(path: Path, questions: Sequence[Question], model: str, longest: int | None = None) -> int:
    """How many questions the file already answers; a line that was cut off does not count.

    Raises InputError when its lines are not the first of these questions, by this model, as long as now.
    """
    lines = whole_lines(path)
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        wanted = questions[number] if number < len(questions) else None
        if (
            not isinstance(row, dict)
            or wanted is None
            or (row.get("id"), row.get("prompt"), row.get("model")) != (wanted.id, wanted.prompt, model)
        ):
            expected = "nothing" if wanted is None else f"the answer of {model!r} to question {wanted.id!r}"
            raise InputError(
                f"'{path}', line {number + 1}: {expected} belongs here; the file is of another run, "
                "name another one or remove it"
            )
        if row.get("max_new_tokens") != longest:
            found, now = (n or "the benchmark's own number of" for n in (row.get("max_new_tokens"), longest))
            raise InputError(
                f"'{path}', line {number + 1}: its answers have at most {found} tokens, now {now} are "
                "wanted; name another file, or give the same --max-new-tokens"
            )
    return len(lines)


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise InputError(f"the folder '{path.parent}' of '{path.name}' does not exist; make it first")


def _join(path: Path, parts: Sequence[Path], shares: Sequence[Sequence[Question]]) -> None:
    """Waits until every part is whole and joins them. torchrun ends all processes when one fails."""
    while any(_lines(part) < len(share) for part, share in zip(parts, shares, strict=True)):
        time.sleep(0.2)
    with replacing(path) as file:
        for part in parts:
            file.writelines(f"{line}\n" for line in whole_lines(part))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
