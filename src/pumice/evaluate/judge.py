"""Ask a language model to grade answers, and store every reply.

A reply that does not parse is counted and is in no mean; it never becomes a number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.chat_client import ChatEndpoint, ask_in_order
from pumice.errors import InputError
from pumice.evaluate.files import DataFile, read_json, read_lines
from pumice.evaluate.task import Answered, Task
from pumice.files import appending
from pumice.jsonl import is_cut_off


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
        # id -> replies, each with the SHA-256 of its prompt, or "" where the file does not state it
        self._stored: dict[str, list[tuple[str, JudgeReply]]] = {}
        if reviews is not None and reviews.is_file():
            self._read(reviews)
        elif endpoint is None:
            raise InputError(f"the replies '{reviews}' do not exist; check the path or add --judge-url")

    def _read(self, path: Path) -> None:
        rows, broken = read_lines(DataFile(path))
        file_text = DataFile(path).text()
        # 1. A crash can cut off the last line. Drop it, so that its question is asked again.
        if rows and not file_text.endswith("\n"):
            last = file_text.rpartition("\n")[2]
            cut_off = broken[-1:] == [file_text.count("\n") + 1] and is_cut_off(last)
            broken = broken[:-1] if cut_off else broken
            if self.endpoint is not None and not broken:
                with appending(path) if cut_off else path.open("a", encoding="utf-8") as file:
                    file.write("" if cut_off else "\n")
        # 2. MM-Vet's grades are one JSON object over several lines.
        if broken and not rows:
            rows, broken = [read_json(DataFile(path))], []
        if broken:
            raise InputError(
                f"'{path}': {len(broken)} lines are cut off or not JSON, the first is line {broken[0]}; "
                "remove them, they will be asked again"
            )
        for row in rows:
            if "reply" in row or "content" in row:
                text = row.get("reply", row.get("content"))
                key = str(row.get("id") if "reply" in row else row.get("question_id"))
                reply = JudgeReply(
                    str(text), str(row.get("judge", "unknown")), str(row.get("prompt_version", ""))
                )
                self._stored.setdefault(key, []).append((str(row.get("prompt_sha256", "")), reply))
                continue
            for key, grade in row.items():  # MM-Vet's grades: {id: {"model": [...], "content": [...]}}
                if not isinstance(grade, Mapping) or not grade.get("content"):
                    raise InputError(
                        f"'{path}': no replies of a judge in this file; expected 'id' and 'reply' in a line"
                    )
                reply = JudgeReply(str(grade["content"][0]), str((grade.get("model") or ["unknown"])[0]), "")
                self._stored.setdefault(str(key), []).append(("", reply))

    def ask(
        self, prompts: Sequence[tuple[str, str]], version: str, **options: Any
    ) -> list[JudgeReply | None]:
        """Return the reply to each (id, prompt), in order; None without a stored reply and an endpoint."""
        replies = [self._find(key, prompt) for key, prompt in prompts]
        missing = [number for number, reply in enumerate(replies) if reply is None]
        endpoint = self.endpoint
        if missing and endpoint is not None:
            messages = ([{"role": "user", "content": prompts[number][1]}] for number in missing)
            chats = ({"messages": message, **options} for message in messages)
            for number, answer in zip(missing, ask_in_order(endpoint, chats), strict=True):
                if isinstance(answer, InputError):
                    raise answer
                replies[number] = reply = JudgeReply(answer.text, answer.model, version)
                self._store(*prompts[number], reply)
        return replies

    def _find(self, key: str, prompt: str) -> JudgeReply | None:
        stored = self._stored.get(key, ())
        digest = _digest(prompt)
        # Another program's reply states no prompt: assume that it grades this answer.
        return next((reply for prompt_digest, reply in stored if prompt_digest in (digest, "")), None)

    def _store(self, key: str, prompt: str, reply: JudgeReply) -> None:
        if self.path is None:
            return
        row = {
            "id": key,
            "judge": reply.judge,
            "prompt_version": reply.version,
            "prompt_sha256": _digest(prompt),
            "reply": reply.text,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def judge_notes(unparsed: int) -> list[str]:
    """Return the notes of a judged score. unparsed: replies that hold no grade."""
    notes = ["judges differ: compare only results of one judge and one prompt version"]
    if unparsed:
        notes.append(f"{unparsed} replies of the judge do not parse and are in no mean")
    return notes


class JudgedTask(Task):
    """A benchmark that a language model grades; set `judge` before calling `score`."""

    prompt_version: str
    judge: Judge | None = None

    def replies(self, prompts: Sequence[tuple[str, str]], **options: Any) -> list[JudgeReply | None]:
        """Return the judge's reply to each (id, prompt). Raises InputError without a judge or its replies."""
        if self.judge is None:
            raise InputError(
                f"{self.name} is scored by a judge; give --judge-url URL and --judge-model NAME, "
                "or --reviews FILE with its replies"
            )
        replies = self.judge.ask(prompts, self.prompt_version, **options)
        missing = [key for (key, _), reply in zip(prompts, replies, strict=True) if reply is None]
        if missing:
            raise InputError(
                f"'{self.judge.path}' has no reply to {len(missing)} of {len(prompts)} answers (first: "
                f"{missing[0]}); add --judge-url to ask for them"
            )
        return replies

    def judge_summary(
        self, replies: Iterable[JudgeReply | None], unparsed: int, answered: Sequence[Answered]
    ) -> dict[str, Any]:
        """Return what the result states about the judge. unparsed: replies that hold no grade."""
        received = [reply for reply in replies if reply is not None]
        return {
            "models": sorted({reply.judge for reply in received}),
            "prompt_versions": sorted({reply.version or "another program's" for reply in received}),
            "replies": len(received),
            "unparsed": unparsed,
            "used": len(answered) - unparsed,
            "file": str(self.judge.path) if self.judge is not None and self.judge.path else None,
        }
