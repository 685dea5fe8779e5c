"""Ask a language model to grade answers, and store every reply.

A reply that does not parse is counted and is in no mean; it never becomes a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pumice.chat_client import ChatEndpoint, ask_in_order
from pumice.errors import InputError, counted
from pumice.evaluate.files import DataFile, read_json, read_lines
from pumice.evaluate.task import Task
from pumice.jsonl import ResumableFile, is_cut_off, parse_json

T = TypeVar("T")
EXAMPLE = '{"id": "1", "reply": "7"}'  # a row of a file of replies


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply to one prompt."""

    text: str
    judge: str
    version: str  # of the prompt; "" where another program wrote the prompt


class Judge:
    """Looks up replies in a file, asks the endpoint for the others, and appends those to the file.

    The file may also be LLaVA's review file or the grades of MM-Vet's own evaluator.
    """

    def __init__(self, reviews: Path | None = None, endpoint: ChatEndpoint | None = None) -> None:
        if reviews is None and endpoint is None:
            raise InputError("a judge needs --judge-url and --judge-model, or a file of replies in --reviews")
        self.path, self.endpoint = reviews, endpoint
        self._is_one_object = False  # the file, over several lines
        # id -> replies, each with the SHA-256 of its prompt, or "" where the file does not state it
        self._stored: dict[str, list[tuple[str, JudgeReply]]] = {}
        if reviews is not None and reviews.is_file():
            self._read(reviews)
        elif endpoint is None:
            raise InputError(f"the replies '{reviews}' do not exist; check the path or add --judge-url")

    def _read(self, path: Path) -> None:
        file = DataFile(path, example=EXAMPLE)
        text = file.text()
        # 1. MM-Vet's grades are one JSON object over several lines: {id: {"model": [...], "content": [...]}}.
        grades = parse_json(text)
        rows, broken = ([grades], []) if isinstance(grades, dict) else read_lines(file)
        self._is_one_object = isinstance(grades, dict) and "\n" in text.strip()
        # 2. A crash can cut off the last line: its question is asked again.
        if broken[-1:] == [text.count("\n") + 1] and is_cut_off(text.rpartition("\n")[2]):
            broken.pop()
        if broken and not rows:
            read_json(file)  # says where it is damaged
        if broken:
            raise InputError(
                f"'{path}': {counted(len(broken), 'line', 'are')} cut off or not JSON, the first is line "
                f"{broken[0]}; remove what is damaged, it will be asked again"
            )
        # 3. A row of ours has "reply", one of LLaVA's "content".
        for row in rows:
            if "reply" in row or "content" in row:
                key, reply = ("id", "reply") if "reply" in row else ("question_id", "content")
                marks = str(row.get("prompt_version", "")), str(row.get("prompt_sha256", ""))
                self._keep(row.get(key), row[reply], row.get("judge"), *marks)
                continue
            for key, grade in row.items():
                if not isinstance(grade, Mapping) or not grade.get("content"):
                    raise InputError(
                        f"'{path}': no replies of a judge in this file; expected 'id' and 'reply' in a line"
                    )
                self._keep(key, grade["content"][0], (grade.get("model") or [None])[0])

    def _keep(self, key: Any, text: Any, judge: Any, version: str = "", digest: str = "") -> None:
        reply = JudgeReply(str(text), str(judge or "unknown"), version)
        self._stored.setdefault(str(key), []).append((digest, reply))

    def ask(
        self, prompts: Sequence[tuple[str, str]], version: str, **options: Any
    ) -> list[JudgeReply | None]:
        """Return the reply to each (id, prompt), in order; None without a stored reply and an endpoint."""
        replies = [self._find(key, prompt) for key, prompt in prompts]
        missing = [number for number, reply in enumerate(replies) if reply is None]
        if missing and self.endpoint is not None:
            messages = ([{"role": "user", "content": prompts[number][1]}] for number in missing)
            chats = ({"messages": message, **options} for message in messages)
            if self._is_one_object:
                raise InputError(
                    f"'{self.path}' is one JSON object, to which the replies that it lacks cannot be added "
                    f"({len(missing)}, first: {prompts[missing[0]][0]}); name another file in --reviews"
                )
            with nullcontext() if self.path is None else ResumableFile(self.path, lambda _, row: row) as file:
                for number, answer in zip(missing, ask_in_order(self.endpoint, chats), strict=True):
                    if isinstance(answer, InputError):
                        raise answer
                    key, prompt = prompts[number]
                    replies[number] = JudgeReply(answer.text, answer.model, version)
                    row = {
                        "id": key, "judge": answer.model, "prompt_version": version,
                        "prompt_sha256": _digest(prompt), "reply": answer.text,
                    }  # fmt: skip
                    if file is not None:
                        file.write(row)
        return replies

    def _find(self, key: str, prompt: str) -> JudgeReply | None:
        stored = self._stored.get(key, ())
        digest = _digest(prompt)
        # Another program's reply states no prompt: assume that it grades this answer.
        return next((reply for prompt_digest, reply in stored if prompt_digest in (digest, "")), None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class JudgedTask(Task):
    """A benchmark that a language model grades; set `judge` before calling `score`."""

    prompt_version: str
    judge: Judge | None = None

    def grade(
        self, prompts: Sequence[tuple[str, str]], parse: Callable[[str], T | None], **options: Any
    ) -> tuple[list[T | None], list[str], dict[str, Any]]:
        """Ask the judge about each (id, prompt).

        Returns what `parse` reads in each reply, None where it holds no grade; notes on the score; and what
        the result states about the judge. Raises InputError without a judge or its replies.
        """
        if self.judge is None:
            raise InputError(
                f"{self.name} is scored by a judge; give --judge-url URL and --judge-model NAME, "
                "or --reviews FILE with its replies"
            )
        found = self.judge.ask(prompts, self.prompt_version, **options)
        replies = [reply for reply in found if reply is not None]
        if missing := [key for (key, _), reply in zip(prompts, found, strict=True) if reply is None]:
            raise InputError(
                f"'{self.judge.path}' has no reply to {counted(len(missing), 'answer', of=len(prompts))} "
                f"(first: {missing[0]}); add --judge-url to ask for them"
            )
        grades = [parse(reply.text) for reply in replies]
        unparsed = grades.count(None)
        notes = ["judges differ: compare only results of one judge and one prompt version"]
        if unparsed:
            notes.append(
                f"{counted(unparsed, 'reply', 'do')} not parse, and no mean counts "
                f"{'it' if unparsed == 1 else 'them'}"
            )
        summary = {
            "models": sorted({reply.judge for reply in replies}),
            "prompt_versions": sorted({reply.version or "another program's" for reply in replies}),
            "replies": len(replies),
            "unparsed": unparsed,
            "used": len(replies) - unparsed,
            "file": str(self.judge.path) if self.judge.path else None,
        }
        return grades, notes, summary
