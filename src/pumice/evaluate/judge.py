"""Benchmarks that a language model judges: what it was asked and replied is kept, word by word.

A reply that does not parse is counted and left out of every mean, never a number of its own. Knows: the
file of replies and an endpoint. Does not know: the benchmarks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.errors import InputError
from pumice.evaluate.endpoint import Endpoint
from pumice.evaluate.files import DataFile, read_json, read_lines
from pumice.evaluate.task import Answered, Task
from pumice.files import appending

WORKERS = 4  # requests to the judge at a time


@dataclass(frozen=True)
class JudgeReply:
    text: str
    judge: str
    version: str  # of the prompt; "" where another program asked


class Judge:
    """Replies from a file, and from an endpoint for what is not in it; new ones are appended at once.

    The file may also be LLaVA's review file or the grades of MM-Vet's own evaluator.
    """

    def __init__(self, reviews: Path | None = None, endpoint: Endpoint | None = None) -> None:
        if reviews is None and endpoint is None:
            raise InputError("a judge needs --judge-url and --judge-model, or a file of replies in --reviews")
        self.path, self.endpoint = reviews, endpoint
        self._stored: dict[str, list[tuple[str, JudgeReply]]] = {}
        if reviews is not None and reviews.is_file():
            self._read(reviews)
        elif endpoint is None:
            raise InputError(f"the replies '{reviews}' do not exist; check the path or add --judge-url")

    def _read(self, path: Path) -> None:
        rows, broken = read_lines(DataFile(path))
        whole = DataFile(path).text()
        if rows and not whole.endswith("\n"):
            torn = broken[-1:] == [whole.count("\n") + 1]  # by a crash; it will be asked again
            broken = broken[:-1] if torn else broken
            if self.endpoint is not None:
                with appending(path) if torn else path.open("a", encoding="utf-8") as file:
                    file.write("" if torn else "\n")
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
                        f"'{path}': no replies of a judge here; expected 'id' and 'reply' in a line"
                    )
                reply = JudgeReply(str(grade["content"][0]), str((grade.get("model") or ["unknown"])[0]), "")
                self._stored.setdefault(str(key), []).append(("", reply))

    def ask(
        self, prompts: Sequence[tuple[str, str]], version: str, **options: Any
    ) -> list[JudgeReply | None]:
        """A reply to each (id, prompt), in order; None where there is none and no endpoint to ask."""
        found = [self._find(key, prompt) for key, prompt in prompts]
        missing = [number for number, reply in enumerate(found) if reply is None]
        endpoint = self.endpoint
        if missing and endpoint is not None:
            with ThreadPoolExecutor(WORKERS) as pool:
                replies = pool.map(lambda number: endpoint.chat(prompts[number][1], **options), missing)
                for number, (text, name) in zip(missing, replies, strict=True):
                    found[number] = JudgeReply(text, name, version)
                    self._store(*prompts[number], JudgeReply(text, name, version))
        return found

    def _find(self, key: str, prompt: str) -> JudgeReply | None:
        stored = self._stored.get(key, ())
        digest = _digest(prompt)
        # A reply without a digest was made by another program, for this answer as far as anyone knows.
        return next((reply for known, reply in stored if known in (digest, "")), None)

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


class JudgedTask(Task):
    """A benchmark whose score needs a judge; set `judge` before `score`."""

    judged = True
    prompt_version: str
    judge: Judge | None = None

    def replies(self, prompts: Sequence[tuple[str, str]], **options: Any) -> list[JudgeReply | None]:
        """Raises InputError when there is no judge, or replies are missing without an endpoint."""
        if self.judge is None:
            raise InputError(
                f"{self.name} is scored by a judge; give --judge-url URL and --judge-model NAME, "
                "or --reviews FILE with its replies"
            )
        found = self.judge.ask(prompts, self.prompt_version, **options)
        missing = [key for (key, _), reply in zip(prompts, found, strict=True) if reply is None]
        if missing:
            raise InputError(
                f"'{self.judge.path}' has no reply to {len(missing)} of {len(prompts)} answers (first: "
                f"{missing[0]}); add --judge-url to ask for them"
            )
        return found

    def about(
        self, replies: Iterable[JudgeReply | None], unparsed: int, answered: Sequence[Answered]
    ) -> dict[str, Any]:
        """What the result says of the judge."""
        there = [reply for reply in replies if reply is not None]
        return {
            "models": sorted({reply.judge for reply in there}),
            "prompt_versions": sorted({reply.version or "another program's" for reply in there}),
            "replies": len(there),
            "unparsed": unparsed,
            "used": len(answered) - unparsed,
            "file": str(self.judge.path) if self.judge is not None and self.judge.path else None,
        }
