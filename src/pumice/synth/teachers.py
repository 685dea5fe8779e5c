"""Teachers, which answer requests: an endpoint, called from this process, or a model in our engine.

A teacher's `answer` writes replies to the journal. It returns why it ended early, or "".
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

from pumice.chat_client import ChatClient, Outcome
from pumice.errors import InputError, WorkError
from pumice.stopping import at_signal
from pumice.synth.endpoint import Budget, Endpoint, examine_reply
from pumice.synth.journal import Journal, TeacherRequest, failed, reply

READY = 4  # requests that are held ready, times the calls under way
Progress = Callable[[dict[str, Any]], None]


class Teacher(Protocol):
    """What `run` needs of a teacher. Its name and its options of sampling enter a request's identity."""

    model: str
    options: dict[str, Any]

    def check(self) -> None: ...
    def answer(self, requests: Iterable[TeacherRequest], journal: Journal, progress: Progress) -> str: ...


class RemoteTeacher:
    """A teacher behind an OpenAI-compatible endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.model, self.options = endpoint, endpoint.model, endpoint.options

    def check(self) -> None:
        self.endpoint.check()

    def answer(self, requests: Iterable[TeacherRequest], journal: Journal, progress: Progress) -> str:
        """Raises InputError when the endpoint cannot be used, WorkError when the journal cannot."""
        try:
            why, message = asyncio.run(_answer_all(self.endpoint, requests, journal, progress))
        except OSError as error:
            raise WorkError(f"the journal '{journal.path}' cannot be written: {error}") from error
        if why == "interrupted":
            raise KeyboardInterrupt
        if why == "input":
            raise InputError(message)
        return why


async def _answer_all(
    endpoint: Endpoint, requests: Iterable[TeacherRequest], journal: Journal, progress: Progress
) -> tuple[str, str]:
    calls = TeacherCalls(endpoint, journal, progress)
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    # At the first signal, the calls under way, which are paid for, come to their end.
    with at_signal(lambda _: loop.call_soon_threadsafe(calls.end, "interrupted")):
        try:
            for request in requests:
                tasks.add(asyncio.create_task(calls.answer(request)))
                if len(tasks) >= READY * endpoint.parallel:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.gather(*done)
                if calls.stopped[0]:
                    break
        except InputError as error:  # a picture that went away since the estimate
            calls.end("input", str(error))
        await asyncio.gather(*tasks)
        await calls.close()
    return calls.stopped


class TeacherCalls(ChatClient):
    """The calls of a run: each is set aside in the budget, and in the journal, before it is sent."""

    def __init__(self, endpoint: Endpoint, journal: Journal, progress: Progress) -> None:
        super().__init__(endpoint)
        self.endpoint, self.journal, self.progress = endpoint, journal, progress
        self.budget = Budget(endpoint, (journal.tally.tokens_in, journal.tally.tokens_out))
        self._syncing = asyncio.Lock()
        self._written = self._synced = 0  # batches of records: to the system, and on the disk

    async def answer(self, request: TeacherRequest) -> None:
        """Send a request until it is answered or given up."""
        refusals = 0

        async def attempt() -> Outcome | None:
            nonlocal refusals
            outcome = await self._send(request, refusals)
            refusals += outcome is not None and outcome.why == "refusal"
            return outcome

        outcome = await self.ask(attempt, tokens=sum(self.endpoint.bound(request)) / 3)
        if outcome is not None and outcome.what == "leave" and not self.answered:
            self.end("input", outcome.message)

    async def _send(self, request: TeacherRequest, refusals: int) -> Outcome | None:
        """Make one call; None when none may be made."""
        # 1. Set aside what it may cost, and write it down.
        reserved = await self.budget.reserve(request)
        if reserved is None:
            self.end("budget")
            return None
        try:
            body = self.endpoint.body(request)
        except InputError as error:
            self.end("input", str(error))
        if self.stopped[0]:
            await self.budget.settle(reserved, (0, 0))
            return None
        await self._write(self.journal.sent(request, reserved, self.endpoint.model))
        # 2. Send it. A refusal that comes again and again is the reply.
        again = f"-{refusals}" if refusals else ""
        outcome = examine_reply(await self.post(body, f"{request.id}{again}"), self.endpoint)
        if outcome.what == "refused" and refusals + 1 == self.endpoint.refusals:
            outcome = replace(outcome, what="reply")
        # 3. Write down what came of it.
        cost = reserved if outcome.cost is None else outcome.cost
        if outcome.what == "reply":
            record = reply(request.id, outcome.raw, cost)
        else:
            record = failed(request.id, outcome.why, outcome.status, outcome.raw, cost)
        await self._write([record])
        await self.budget.settle(reserved, cost)
        answered = outcome.what == "reply" and not outcome.why
        self.progress({"answered": answered, "spent": self.budget.spent})
        return outcome

    async def _write(self, records: list[dict[str, Any]]) -> None:
        """Return when the records are on the disk. Those of calls that end together share one fsync."""
        self.journal.write(records)
        self._written += 1
        mine = self._written
        async with self._syncing:
            if self._synced < mine:
                latest = self._written
                await asyncio.to_thread(self.journal.sync)
                self._synced = latest


class LocalTeacher:
    """A teacher in our own engine. It costs nothing; a killed run repeats at most `batch` answers."""

    def __init__(
        self, model: str, device: str | None = None, batch: int = 8, options: dict[str, Any] | None = None
    ) -> None:
        self.model, self.device, self.batch = model, device, batch
        self.options = options or {}

    def check(self) -> None:
        """Raise InputError on wrong options, as far as is known before the model is opened."""
        from pumice.engine.params import SamplingParams
        from pumice.formats.read import stored_generation

        SamplingParams.of(self.options)
        if (generation := stored_generation(self.model)) is not None:
            self._sampling(generation)

    def _sampling(self, generation: dict[str, Any]) -> dict[str, Any]:
        """Return how answers are sampled. generation: what the model's folder says."""
        from pumice.engine.params import SamplingParams

        # Small models repeat themselves. The penalty turns off the folder's beams; beams that are asked for
        # turn off the penalty.
        defaults = {**generation, "num_beams": 1, "repetition_penalty": 1.1}
        return SamplingParams.options(defaults, self.options)

    def answer(self, requests: Iterable[TeacherRequest], journal: Journal, progress: Progress) -> str:
        from pumice.assistant import load

        assistant = load(self.model, device=self.device)
        waiting = iter(requests)
        while batch := list(islice(waiting, self.batch)):
            self._answer(assistant, batch, journal, progress)
        return ""

    def _answer(
        self, assistant: Any, batch: list[TeacherRequest], journal: Journal, progress: Progress
    ) -> None:
        rows = [(request.picture(), flat(request)) for request in batch]
        sampling = self._sampling(assistant.generation)  # raises before anything is sent
        options = {"max_new_tokens": max(r.max_tokens for r in batch), **sampling}
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
            progress({"answered": not refused, "spent": (0, 0)})
        if len(errors) == len(batch) and not journal.tally.replies:
            raise errors[0]  # nothing fits: a prompt too long for it, say; more of the same would not either


def flat(request: TeacherRequest) -> str:
    """A request as one question, for a model that is asked without a history."""
    role_prefix = {"system": "", "user": "Notes:\n", "assistant": "You write:\n"}
    parts = [f"{role_prefix[role]}{text}" for role, text in request.prompt]
    return "\n\n".join([*parts, *([f"Notes:\n{request.user}"] if request.user else [])])
