"""Teachers, which answer requests: an endpoint, called by the courier, or a model in our engine.

A teacher's `answer` writes replies to the journal. It returns why it ended early, or "".
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any, Protocol

from pumice.errors import InputError, WorkError
from pumice.synth.endpoint import Endpoint
from pumice.synth.journal import Journal, TeacherRequest, failed, reply

Progress = Callable[[dict[str, Any]], None]


class Teacher(Protocol):
    """What `run` needs of a teacher. Its name and its options of sampling enter a request's identity."""

    @property
    def model(self) -> str: ...
    @property
    def options(self) -> dict[str, Any]: ...

    def check(self) -> None: ...
    def answer(self, requests: Iterable[TeacherRequest], journal: Journal, progress: Progress) -> str: ...


@dataclass(frozen=True)
class RemoteTeacher:
    """A teacher behind an OpenAI-compatible endpoint."""

    endpoint: Endpoint

    @property
    def model(self) -> str:
        return self.endpoint.model

    @property
    def options(self) -> dict[str, Any]:
        return self.endpoint.options

    def check(self) -> None:
        if find_spec("httpx") is None:
            raise InputError("an endpoint needs httpx; install pumice[generate]")
        self.endpoint.check()

    def answer(self, requests: Iterable[TeacherRequest], journal: Journal, progress: Progress) -> str:
        """Raises InputError when the endpoint cannot be used, WorkError when the courier broke."""
        courier = subprocess.Popen(
            [sys.executable, "-m", "pumice.synth.courier", str(journal.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # neither Ctrl-C nor the death of our group reaches it
        )
        assert courier.stdin is not None and courier.stdout is not None and courier.stderr is not None
        stdin, last_words = courier.stdin, [""]
        wrong: list[InputError] = []
        settings = {**asdict(self.endpoint), "parent": os.getpid()}

        def tell() -> None:
            # A courier that has stopped early closes its end; what it did not take was not sent.
            with contextlib.suppress(OSError):
                stdin.write(json.dumps(settings).encode() + b"\n")
                try:
                    for message in _messages(requests):
                        stdin.write(json.dumps(message).encode() + b"\n")
                except InputError as error:  # a picture that went away since the estimate
                    wrong.append(error)
                stdin.write(b'{"end": true}\n')
                stdin.flush()

        def overhear(stream: Any) -> None:
            for line in stream:
                last_words[0] = line.decode("utf-8", "replace").strip() or last_words[0]

        threads = [
            threading.Thread(target=tell, daemon=True),
            threading.Thread(target=overhear, args=(courier.stderr,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        end: dict[str, Any] = {}
        try:
            for line in courier.stdout:
                message = json.loads(line)
                if "done" in message:
                    progress(message)
                else:
                    end = message
                    break
        finally:
            # Also when interrupted: the calls under way are paid for and waited for.
            if not end:
                courier.terminate()
            status = courier.wait()
            for thread in threads:
                thread.join()
            with contextlib.suppress(OSError):
                stdin.close()
            courier.stdout.close()
            courier.stderr.close()
            journal.read()
        if wrong:
            raise wrong[0]
        if end.get("stopped") == "input":
            raise InputError(end["message"])
        if not end or end.get("stopped") == "work":
            raise WorkError(
                end.get("message") or f"the process that calls the endpoint ended ({status}): {last_words[0]}"
            )
        return str(end.get("stopped", ""))


def _messages(requests: Iterable[TeacherRequest]) -> Iterator[dict[str, Any]]:
    told: set[str] = set()
    for request in requests:
        if request.prompt_id not in told:
            told.add(request.prompt_id)
            yield {"prompt": request.prompt, "id": request.prompt_id}
        yield {
            "id": request.id, "of": request.prompt_id, "user": request.user, "max_tokens": request.max_tokens,
            "image": request.image, "image_key": request.image_key,
        }  # fmt: skip


class LocalTeacher:
    """A teacher in our own engine. It costs nothing; a killed run repeats at most `batch` answers."""

    def __init__(
        self, model: str, device: str | None = None, batch: int = 8, options: dict[str, Any] | None = None
    ) -> None:
        self.model, self.device, self.batch = model, device, batch
        self.options = options or {}

    def check(self) -> None:
        """Raise InputError on options that sampling does not have; the model is opened when it is asked."""
        from pumice.engine.sampling import SamplingParams

        try:
            SamplingParams(**self.options)
        except TypeError as error:
            known = ", ".join(field.name for field in fields(SamplingParams))
            raise InputError(f"a local teacher's options are {known}, not all of {self.options}") from error

    def answer(self, requests: Iterable[TeacherRequest], journal: Journal, progress: Progress) -> str:
        from pumice.assistant import load

        assistant = load(self.model, device=self.device)
        waiting: list[TeacherRequest] = []
        for request in requests:
            waiting.append(request)
            if len(waiting) == self.batch:
                self._answer(assistant, waiting, journal, progress)
                waiting = []
        self._answer(assistant, waiting, journal, progress)
        return ""

    def _answer(
        self, assistant: Any, batch: list[TeacherRequest], journal: Journal, progress: Progress
    ) -> None:
        if not batch:
            return
        rows = [(request.picture(), flat(request)) for request in batch]
        options = {
            "max_new_tokens": max(r.max_tokens for r in batch),
            "repetition_penalty": 1.1,
            **self.options,
        }
        journal.append([r for q in batch for r in journal.sent(q, (0, 0), self.model)])
        errors = []
        for request, text in zip(batch, assistant.ask_each(rows, slots=self.batch, **options), strict=True):
            refused = isinstance(text, InputError)
            if refused:
                errors.append(text)
                record = failed(request.id, "refused by the model", None, str(text), (0, 0))
            else:
                record = reply(request.id, json.dumps({"text": text}, ensure_ascii=False), (0, 0))
            journal.append([record])
            progress({"done": request.id, "answered": not refused, "why": "", "spent": (0, 0)})
        journal.read()
        if len(errors) == len(batch) and not journal.tally.replies:
            raise errors[0]  # nothing fits: a prompt too long for it, say; more of the same would not either


def flat(request: TeacherRequest) -> str:
    """A request as one question, for a model that is asked without a history."""
    role_prefix = {"system": "", "user": "Notes:\n", "assistant": "You write:\n"}
    parts = [f"{role_prefix[role]}{text}" for role, text in request.prompt]
    return "\n\n".join([*parts, *([f"Notes:\n{request.user}"] if request.user else [])])
