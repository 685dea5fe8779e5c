"""Asking and keeping: order, resuming, shares of processes, and models behind an address."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import InputError
from pumice.evaluate.files import ImageFile
from pumice.evaluate.run import (
    EndpointAnswerer,
    LocalAnswerer,
    check_images,
    group_by_images,
    run,
    shard,
)
from pumice.evaluate.task import Question
from pumice.evaluate.tasks import get_task
from pumice.files import hold

TASK = get_task("own")
PNG = b"\x89PNG\r\n\x1a\n"  # how the file of a picture begins


def picture(name: str) -> ImageFile:
    def load() -> bytes:
        if "missing" in name:
            raise InputError(f"picture '{name}' is not there")
        return PNG + name.encode()

    return ImageFile(name, load, lambda: f"picture '{name}' is not there" if "missing" in name else "")


def question(key: int, image: str | None) -> Question:
    return Question(f"q{key}", (picture(image),) if image else (), f"Question {key}?", {"answers": ["x"]})


QUESTIONS = [question(n, f"p{n % 3}.png") for n in range(9)] + [question(9, None)]


class Counts:
    """An answerer that says how many it was asked; stops after `most` if that is given."""

    name = "counts"

    def __init__(self, limit: int | None = None) -> None:
        self.asked: list[str] = []
        self.limit = limit

    def answer(self, questions: Iterable[Question], max_new_tokens: int) -> Iterator[str | InputError]:
        for one in questions:
            if self.limit is not None and len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append(one.id)
            yield f"answer to {one.prompt}"


class Named(Counts):
    name = "other"


def test_the_questions_of_a_picture_are_asked_together() -> None:
    assert [q.id for q in group_by_images(QUESTIONS)] == [
        "q0",
        "q3",
        "q6",
        "q1",
        "q4",
        "q7",
        "q2",
        "q5",
        "q8",
        "q9",
    ]


def test_a_run_that_was_stopped_ends_with_the_same_file(tmp_path: Path) -> None:
    complete_path, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert run(TASK, QUESTIONS, Counts(), complete_path)
    with pytest.raises(KeyboardInterrupt):
        run(TASK, QUESTIONS, Counts(4), stopped)
    with stopped.open("a") as file:
        file.write('{"id": "q4", "pro')  # as a kill in the middle of a line leaves it
    again = Counts()
    assert run(TASK, QUESTIONS, again, stopped)
    assert again.asked == ["q4", "q7", "q2", "q5", "q8", "q9"]
    assert stopped.read_bytes() == complete_path.read_bytes()
    nothing = Counts()
    assert run(TASK, QUESTIONS, nothing, complete_path)
    assert nothing.asked == []
    row = json.loads(complete_path.read_text().splitlines()[0])
    assert row == {"id": "q0", "prompt": "Question 0?", "answer": "answer to Question 0?", "model": "counts"}


@pytest.mark.parametrize("lines", [1, 4])
def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path, lines: int) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    run(TASK, QUESTIONS, Counts(), whole)
    path.write_bytes(b"".join(whole.read_bytes().splitlines(True)[:lines]).rstrip(b"\n"))
    again = Counts()
    assert run(TASK, QUESTIONS, again, path)
    assert len(again.asked) == len(QUESTIONS) - lines
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "text", ["my notes", "12", '[{"id": "q0", "answer": "x"}]', '{"id": "q0", "answer": "x"}', '"x']
)
def test_another_file_of_one_line_without_end_loses_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.jsonl', line 1.* name another"):
        run(TASK, QUESTIONS, Counts(), path)
    assert path.read_text() == text


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    run(TASK, QUESTIONS, Counts(), path)
    with pytest.raises(InputError, match=r"line 10: nothing belongs here; the file is of another run"):
        run(TASK, QUESTIONS[:-1], Counts(), path)
    with pytest.raises(InputError, match="line 1: the answer of 'other' to question 'q0' belongs here"):
        run(TASK, QUESTIONS, Named(), path)
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        run(TASK, QUESTIONS, Counts(), tmp_path / "no" / "a.jsonl")
    with hold(path, f"writing the file '{path}'"), pytest.raises(InputError, match="another run is writing"):
        run(TASK, QUESTIONS, Counts(), path)


def test_another_longest_answer_is_told_and_kept(tmp_path: Path) -> None:
    questions, path = [question(0, None), question(1, None)], tmp_path / "answers.jsonl"
    task = get_task("gqa")
    run(task, questions[:1], Counts(), path, max_new_tokens=5)
    assert json.loads(path.read_text())["max_new_tokens"] == 5
    with pytest.raises(InputError, match="at most 5 tokens, now the benchmark's own number"):
        run(task, questions, Counts(), path)
    run(task, questions, Counts(), path, max_new_tokens=5)
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("world", [1, 2, 3, 4, 20])
def test_shares_keep_pictures_whole_and_order(world: int) -> None:
    ordered = group_by_images(QUESTIONS)
    shares = [shard(ordered, rank, world) for rank in range(world)]
    assert [q.id for share in shares for q in share] == [q.id for q in ordered]
    owners = {q.images[0].name: rank for rank, share in enumerate(shares) for q in share if q.images}
    for rank, share in enumerate(shares):
        assert all(owners[q.images[0].name] == rank for q in share if q.images)


def test_processes_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete_path, path = tmp_path / "whole.jsonl", tmp_path / "shared.jsonl"
    run(TASK, QUESTIONS, Counts(), complete_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 1, 0):  # the first waits for the others, so it comes last here
        monkeypatch.setenv("RANK", str(rank))
        assert run(TASK, QUESTIONS, Counts(), path) is (rank == 0)
    assert path.read_bytes() == complete_path.read_bytes()
    again = Counts()
    assert run(TASK, QUESTIONS, again, path) and again.asked == []
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(InputError, match="RANK or WORLD_SIZE is no number"):
        run(TASK, QUESTIONS, Counts(), path)


class Batches:
    """An assistant: takes rows in advance, as the engine does."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, str]] = []

    def ask_each(self, rows: Iterable[tuple[Any, str]], *, slots: int = 8, **sampling: Any) -> Iterator[Any]:
        assert sampling == {"max_new_tokens": TASK.max_new_tokens}
        for row in list(rows):
            if isinstance(row, InputError):
                yield row
                continue
            self.rows.append(row)
            yield f"{len(row[0] or ())} {row[1]}"


def test_a_local_model_and_pictures_that_are_missing(tmp_path: Path) -> None:
    asked = [question(0, "missing0"), question(1, "a"), question(2, "missing2"), question(3, "missing3"),
             question(4, None), question(5, "missing5")]  # fmt: skip
    assistant = Batches()
    path = tmp_path / "a.jsonl"
    run(TASK, asked, LocalAnswerer(assistant, "m"), path, allow_missing=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("answer") for row in rows] == [None, "1 Question 1?", None, None, "0 Question 4?", None]
    assert "missing2" in rows[2]["error"]
    assert assistant.rows == [([PNG + b"a"], "Question 1?"), (None, "Question 4?")]
    with pytest.raises(InputError, match="question q0 of own cannot be asked: picture 'missing0'"):
        run(TASK, asked, LocalAnswerer(Batches(), "m"), tmp_path / "b.jsonl")


def test_missing_pictures_are_counted_before_the_first_question() -> None:
    asked = [question(0, "missing0"), question(1, "a"), question(2, "missing2"), question(3, "missing2")]
    with pytest.raises(InputError, match="2 of 3 pictures are missing; the first: picture 'missing0'"):
        check_images(asked, allow_missing=False)
    assert check_images(asked, allow_missing=True) == 2
    assert check_images(asked[1:2], allow_missing=False) == 0


def test_a_model_behind_an_address_answers_in_order(tmp_path: Path, chat_server: Any) -> None:
    third = threading.Event()

    def reply(body: Any) -> str:
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        # The first question goes alone; the second one is answered after the third.
        if text == "Question 3?":
            assert third.wait(180)
        elif text == "Question 6?":
            third.set()
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.0, TASK.max_new_tokens)
        return f"to {text}"

    server = chat_server(*[reply] * len(QUESTIONS))
    path = tmp_path / "a.jsonl"
    run(TASK, QUESTIONS, EndpointAnswerer(server.endpoint("big", parallel=2)), path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"to {q.prompt}" for q in group_by_images(QUESTIONS)]
    assert rows[0]["model"] == "big"


def test_an_address_that_refuses_ends_the_run_and_a_question_only_itself(
    tmp_path: Path, chat_server: Any
) -> None:
    path = tmp_path / "a.jsonl"
    key = chat_server(401)
    with pytest.raises(InputError, match="refuses the key"):
        run(TASK, QUESTIONS, EndpointAnswerer(key.endpoint("big")), path, allow_missing=True)
    assert (len(key.asked), path.read_text()) == (1, "")
    asked = [question(0, "missing"), *QUESTIONS[1:3]]
    one = chat_server(400, "fine")
    run(TASK, asked, EndpointAnswerer(one.endpoint("big")), path, allow_missing=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert "is not there" in rows[0]["error"] and "does not take the request" in rows[1]["error"]
    assert rows[2]["answer"] == "fine"
