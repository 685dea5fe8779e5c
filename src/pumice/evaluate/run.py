"""Ask a model a benchmark's questions and append each answer to predictions.jsonl.

A stopped run continues where it stopped and ends with the same file as a run without a stop. Under torchrun
each process answers a share of the questions, and the first process joins the shares in order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pumice.chat_client import ChatEndpoint, ask_in_order, with_images
from pumice.errors import CAUSE, InputError, counted, wrong_input
from pumice.evaluate.task import Question, Task
from pumice.files import replacing, whole_lines
from pumice.jsonl import ResumableFile, read_values

if TYPE_CHECKING:
    from pumice.assistant import Assistant

Progress = Callable[[int, int], None]  # (answered questions, all questions)


class Answerer(Protocol):
    """A model that answers questions in order and reads each question only when it needs it."""

    name: str

    def answer(self, questions: Iterable[Question], max_new_tokens: int) -> Iterator[str | InputError]:
        """Yield one answer per question, or an InputError for a question that cannot be asked."""
        ...


class LocalAnswerer:
    """Answers with a model in this process, as its folder says; greedily if it says nothing."""

    def __init__(self, assistant: Assistant, name: str, slots: int = 16) -> None:
        self.assistant, self.name, self.slots = assistant, name, slots

    def answer(self, questions: Iterable[Question], max_new_tokens: int) -> Iterator[str | InputError]:
        rows = _each(questions, lambda question, images: (images or None, question.prompt))
        return self.assistant.ask_each(rows, slots=self.slots, max_new_tokens=max_new_tokens)


def endpoint_at(url: str, model: str, parallel: int) -> ChatEndpoint:
    """Return the endpoint of a model that answers or judges. Raises InputError where `url` is no address."""
    endpoint = ChatEndpoint(url, model, parallel=parallel, attempts=5, backoff=2.0)
    endpoint.check()
    return endpoint


class EndpointAnswerer:
    """Answers with a model behind an OpenAI-compatible server: vLLM, a hosted model, `pumice serve`."""

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self.endpoint, self.name = endpoint, endpoint.model

    def answer(self, questions: Iterable[Question], max_new_tokens: int) -> Iterator[str | InputError]:
        def chat(question: Question, images: list[Any]) -> dict[str, Any]:
            content = with_images(question.prompt, images) if images else question.prompt
            message = {"role": "user", "content": content}
            return {"messages": [message], "temperature": 0.0, "max_tokens": max_new_tokens}

        for reply in ask_in_order(self.endpoint, _each(questions, chat)):
            yield reply if isinstance(reply, InputError) else reply.text


def _each(questions: Iterable[Question], make: Callable[[Question, list[Any]], Any]) -> Iterator[Any]:
    """Yield what `make` makes of each question and its images, or why these cannot be read."""
    for question in questions:
        try:
            made = make(question, [image.source() for image in question.images])
        except InputError as error:
            made = error
        yield made


def group_by_images(questions: Sequence[Question]) -> list[Question]:
    """Order the questions so that those about one image follow each other and share its KV entries.

    Images keep the order of their first question.
    """
    by_images: dict[tuple[str, ...], list[Question]] = {}
    for question in questions:
        by_images.setdefault(_image_names(question), []).append(question)
    return [question for group in by_images.values() for question in group]


def shard(questions: Sequence[Question], rank: int, world: int) -> list[Question]:
    """Return one process's share of the questions; all questions about an image are in one share.

    questions: in the order of `group_by_images`. Shares have about the same number of questions.
    """
    if not 0 <= rank < world:
        raise InputError(f"there is no rank {rank} among {world} processes; check RANK and WORLD_SIZE")
    share: list[Question] = []
    index = 0
    # The owner changes only between images, so that no image is encoded by two processes.
    for _, group in groupby(questions, key=_image_names):
        same_images = list(group)
        share += same_images if index * world // len(questions) == rank else []
        index += len(same_images)
    return share


def _image_names(question: Question) -> tuple[str, ...]:
    """Return the names of a question's images; of one without any, a name of its own."""
    return tuple(image.name for image in question.images) or (f"\0{question.id}",)


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes, from torchrun's RANK and WORLD_SIZE."""
    with wrong_input(ValueError, f"RANK or WORLD_SIZE is no number ({CAUSE}); start with torchrun"):
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_images(questions: Sequence[Question], *, allow_missing: bool) -> int:
    """Return the number of missing images. Raises InputError that counts them unless `allow_missing`."""
    images = {image.name: image for question in questions for image in question.images}
    problems = [problem for image in images.values() if (problem := image.problem())]
    if problems and not allow_missing:
        raise InputError(
            f"{counted(len(problems), 'picture', 'are', of=len(images))} missing; the first: {problems[0]}; "
            "or add --allow-missing, and the result is marked as partial"
        )
    return len(problems)


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
    """Append the answers to all questions to `path`; return True in the process that scores the file.

    max_new_tokens: a limit other than the task's; every line of the file then states it.
    Raises InputError when the file belongs to another run, or when a question cannot be asked and
    `allow_missing` is False; answers already written stay in the file.
    """
    # 1. Find out which questions this process answers, and in which file.
    rank, world = rank_and_world()
    ordered = group_by_images(questions)
    max_tokens = max_new_tokens or task.max_new_tokens
    limit = None if max_tokens == task.max_new_tokens else max_tokens
    checked = partial(check_line, model=answerer.name, max_tokens=limit)
    joined = read_values(path, partial(checked, path, ordered)) if world > 1 and path.exists() else ()
    if joined and len(joined) == len(ordered):
        return rank == 0
    parts = [path if world == 1 else path.with_name(f"{path.name}.{r}-of-{world}") for r in range(world)]
    share = shard(ordered, rank, world)
    if not path.parent.is_dir():
        raise InputError(f"the folder '{path.parent}' of '{path.name}' does not exist; make it first")
    # 2. Answer what the file lacks.
    with ResumableFile(parts[rank], partial(checked, parts[rank], share)) as file:
        answered = len(file.values)
        remaining = share[answered:]
        answers = answerer.answer(remaining, max_tokens)
        for number, (question, answer) in enumerate(zip(remaining, answers, strict=True), answered + 1):
            failed = isinstance(answer, InputError)
            if failed and not allow_missing:
                raise InputError(f"question {question.id} of {task.name} cannot be asked: {answer}")
            row = {"id": question.id, "prompt": question.prompt, "error" if failed else "answer": str(answer)}
            row["model"] = answerer.name
            file.write(row if limit is None else {**row, "max_new_tokens": limit})
            if progress is not None:
                progress(number, len(share))
    # 3. The first process joins the parts, so that the result is the same file as of one process.
    if world > 1 and rank == 0:
        _join_parts(path, parts, [shard(ordered, r, world) for r in range(world)])
    return rank == 0


def check_line(
    path: Path, questions: Sequence[Question], number: int, row: Any, *, model: str, max_tokens: int | None
) -> None:
    """Raise InputError unless line `number` (from 0) answers its question, by this model under this limit.

    max_tokens: the limit of an answer, None for the benchmark's own.
    """
    question = questions[number] if number < len(questions) else None
    values = row if isinstance(row, dict) else {}
    line = values.get("id"), values.get("prompt"), values.get("model")
    if question is None or line != (question.id, question.prompt, model):
        expected = "nothing" if question is None else f"the answer of {model!r} to question {question.id!r}"
        raise InputError(
            f"'{path}', line {number + 1}: {expected} belongs here; the file is of another run, "
            "name another file or remove it"
        )
    if values.get("max_new_tokens") != max_tokens:
        limits = values.get("max_new_tokens"), max_tokens
        file_limit, run_limit = (limit or "the benchmark's own number of" for limit in limits)
        raise InputError(
            f"'{path}', line {number + 1}: its answers have at most {file_limit} tokens, now {run_limit} "
            "are wanted; name another file, or give the same --max-new-tokens"
        )


def _join_parts(path: Path, parts: Sequence[Path], shares: Sequence[Sequence[Question]]) -> None:
    """Wait until every part is complete, then join them. torchrun ends all processes when one fails."""
    for part, share in zip(parts, shares, strict=True):
        while not part.exists() or len(whole_lines(part)) < len(share):
            time.sleep(0.2)
    with replacing(path) as file:
        for part in parts:
            file.writelines(f"{line}\n" for line in whole_lines(part))
