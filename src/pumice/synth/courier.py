"""The courier: the process that calls the endpoint and outlives a killed command by a few seconds.

    python -m pumice.synth.courier JOURNAL      (started by `call`; not for people)

A call that was sent is paid for, so its reply must reach the journal even if the command is killed with
SIGKILL. The calls are therefore made in another process, in its own session. It reads requests from
standard input. When that ends early, its parent is gone: it sends nothing more, waits for the replies under
way, writes them down, and ends. The next command waits for it and continues from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx

from pumice.errors import InputError
from pumice.files import Lock
from pumice.synth.endpoint import Endpoint, Outcome, judge
from pumice.synth.journal import Cost, Journal, TeacherRequest, failed, reply

WAITING = 4  # requests that are held ready, times the calls under way
LONGEST_BACKOFF = 60.0  # seconds


class Budget:
    """Tokens and money: what is spent, and what calls under way may still cost at most."""

    def __init__(self, endpoint: Endpoint, spent: Cost) -> None:
        self.endpoint, self.spent = endpoint, spent
        self.reserved: Counter[Cost] = Counter()
        self.scale = 1.0  # grows when an endpoint counts more tokens than the bound allows for
        self._changed = asyncio.Condition()

    def _fits(self, more: Cost) -> bool:
        held = [(cost, number) for cost, number in self.reserved.items() if number]
        total = (
            self.spent[0] + more[0] + sum(c[0] * n for c, n in held),
            self.spent[1] + more[1] + sum(c[1] * n for c, n in held),
        )
        tokens, money = self.endpoint.budget_tokens, self.endpoint.budget_money
        return (tokens is None or sum(total) <= tokens) and (
            money is None or self.endpoint.money(total) <= money
        )

    async def reserve(self, request: TeacherRequest) -> Cost | None:
        """What the call may cost, set aside; None when the budget cannot hold it any more.

        When it would fit but for the reservations of others, wait for their real cost.
        """
        async with self._changed:
            while True:
                bound = self.endpoint.bound(request)
                cost = int(bound[0] * self.scale) + 1, bound[1]
                if self._fits(cost):
                    self.reserved[cost] += 1
                    return cost
                if not +self.reserved:
                    return None
                await self._changed.wait()

    async def settle(self, reserved: Cost, real: Cost) -> None:
        async with self._changed:
            self.reserved[reserved] -= 1
            self.spent = self.spent[0] + real[0], self.spent[1] + real[1]
            if real[0] > reserved[0]:
                self.scale *= real[0] / reserved[0]
            self._changed.notify_all()


class Pace:
    """Lets something pass so many times per minute, evenly."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._next = 0.0

    def delay(self, amount: float = 1.0) -> float:
        """Seconds to wait before passing; the turn is taken."""
        if self.per_minute is None:
            return 0.0
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + amount * 60 / self.per_minute
        return start - now


class Writer:
    """Appends to the journal; records of calls that end together share one fsync."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._waiting: list[tuple[list[dict[str, Any]], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def append(self, records: list[dict[str, Any]]) -> None:
        """Returns when the records are on the disk."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((records, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._flush())
        await done

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self.journal.append, [r for records, _ in batch for r in records])
            except OSError as error:
                for _, done in batch:
                    done.set_exception(error)
            else:
                for _, done in batch:
                    done.set_result(None)


class Courier:
    """Sends requests until they are answered, given up, or the run has to stop."""

    def __init__(self, endpoint: Endpoint, journal: Journal) -> None:
        self.endpoint, self.journal = endpoint, journal
        self.writer = Writer(journal)
        tally = journal.tally
        self.budget = Budget(endpoint, (tally.tokens_in, tally.tokens_out))
        self.requests_pace, self.tokens_pace = Pace(endpoint.per_minute), Pace(endpoint.tokens_per_minute)
        self.slots = asyncio.Semaphore(endpoint.parallel)
        self.stop = asyncio.Event()
        self.stopped: dict[str, Any] = {}  # why, for the parent
        self.answered = 0
        self.resume_at = 0.0  # when the endpoint wants to hear from us again
        self.first = asyncio.Lock()  # until one call has come back, no second is sent
        self.returned = False

    async def run(self, requests: AsyncIterator[TeacherRequest]) -> None:
        tasks: set[asyncio.Task[None]] = set()
        # One connection per call: a kept connection that dies unnoticed leaves open whether a request was
        # sent, and a handshake is nothing beside the seconds that a teacher writes.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            timeout=None, limits=limits, headers={**self.endpoint.headers(), "Connection": "close"}
        ) as client:
            async for request in requests:
                if self.stop.is_set():
                    break
                tasks.add(asyncio.create_task(self._ask(client, request)))
                if len(tasks) >= WAITING * self.endpoint.parallel:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            for task in tasks:
                await task

    def end(self, why: str, message: str = "") -> None:
        """Send nothing more; calls under way are waited for."""
        if not self.stop.is_set():
            self.stopped = {"stopped": why, "message": message}
            self.stop.set()

    async def _ask(self, client: httpx.AsyncClient, request: TeacherRequest) -> None:
        refusals = failures = 0
        answered = -1  # by anybody, when this request failed last
        while failures < self.endpoint.attempts:
            outcome = await self._call(client, request, refusals)
            if outcome is None or outcome.what in ("reply", "leave", "stop", "foreign"):
                return
            if outcome.what == "refused":
                refusals += 1
                if refusals == self.endpoint.refusals:
                    return
                continue
            if outcome.wait is not None:
                # While others get through, being put off is no failure but a queue.
                failures += self.answered == answered
                now = asyncio.get_running_loop().time()
                self.resume_at = max(self.resume_at, now + outcome.wait)
            else:
                failures += 1
                if failures < self.endpoint.attempts:
                    longest = min(LONGEST_BACKOFF, self.endpoint.backoff * 2 ** (failures - 1))
                    await self._sleep(random.uniform(0, longest))
            answered = self.answered

    async def _sleep(self, seconds: float) -> None:
        """Sleep, unless the run stops first."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self.stop.wait(), seconds)
            except asyncio.TimeoutError:
                return

    async def _turn(self, request: TeacherRequest) -> Cost | None:
        """Wait until a call may be made; what is reserved for it, or None when there is none any more."""
        await self._sleep(self.requests_pace.delay())
        await self._sleep(self.tokens_pace.delay(sum(self.endpoint.bound(request)) / 3))
        while not self.stop.is_set():
            wait = self.resume_at - asyncio.get_running_loop().time()
            if wait <= 0:
                break
            await self._sleep(wait + random.uniform(0, 0.1 * wait))
        if self.stop.is_set():
            return None
        reserved = await self.budget.reserve(request)
        if reserved is None:
            self.end("budget")
        elif self.stop.is_set():
            await self.budget.settle(reserved, (0, 0))
            return None
        return reserved

    async def _call(
        self, client: httpx.AsyncClient, request: TeacherRequest, refusals: int
    ) -> Outcome | None:
        if not self.returned:
            async with self.first:
                if not self.returned:
                    outcome = await self._send(client, request, refusals)
                    self.returned = True
                    return outcome
        async with self.slots:
            return await self._send(client, request, refusals)

    async def _send(
        self, client: httpx.AsyncClient, request: TeacherRequest, refusals: int
    ) -> Outcome | None:
        reserved = await self._turn(request)
        if reserved is None:
            return None
        try:
            body = json.dumps(self.endpoint.body(request), ensure_ascii=False).encode("utf-8", "replace")
        except InputError as error:  # a picture that went away since the run began
            self.end("input", str(error))
            await self.budget.settle(reserved, (0, 0))
            return None
        await self.writer.append(self.journal.sent(request, reserved, self.endpoint.model))
        again = f"-{refusals}" if refusals else ""
        outcome = await self._post(client, body, f"{request.id}{again}")
        if outcome.what == "foreign" and self.answered:
            outcome = replace(outcome, what="again")  # a gateway's own page; before, it spoke the protocol
        cost = reserved if outcome.cost is None else outcome.cost
        if outcome.what == "reply" or (outcome.what == "refused" and refusals + 1 == self.endpoint.refusals):
            record = reply(request.id, outcome.raw, cost)
            self.answered += 1
        else:
            record = failed(request.id, outcome.why, outcome.status, outcome.raw, cost)
        await self.writer.append([record])
        await self.budget.settle(reserved, cost)
        if outcome.what == "stop":
            self.end("input", outcome.message)
        elif outcome.what in ("foreign", "leave") and not self.answered:
            self.end("input", outcome.message or self._foreign(outcome))
        say(
            {
                "done": request.id,
                "answered": outcome.what == "reply",
                "why": outcome.why,
                "spent": self.budget.spent,
            }
        )
        return outcome

    def _foreign(self, outcome: Outcome) -> str:
        began = " ".join(outcome.raw[:60].split())
        return (
            f"{self.endpoint.address} does not speak the chat completions protocol ({outcome.why}, it begins "
            f"{began!r}); give the address of an OpenAI-compatible endpoint, usually one that ends in /v1"
        )

    async def _post(self, client: httpx.AsyncClient, body: bytes, key: str) -> Outcome:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        reached = False  # whether anything of the request left this machine

        async def trace(event: str, _: Any) -> None:
            nonlocal reached
            reached = reached or event.endswith("send_request_headers.started")

        post = client.post(self.endpoint.address, content=body, headers=headers, extensions={"trace": trace})
        try:
            response = await asyncio.wait_for(post, self.endpoint.timeout)
            raw = response.content.decode("utf-8", "replace")
        except asyncio.TimeoutError:
            if reached:
                return Outcome("again", "timeout", cost=None)
            return Outcome("again", "unreachable", "no connection in time")
        except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            text = f"nothing answers at {self.endpoint.url} ({error}); start the endpoint or mend the address"
            return Outcome("again" if self.answered else "stop", "unreachable", text)
        except httpx.HTTPError as error:  # the connection broke with the request already on its way
            return Outcome("again", "connection broken", str(error), cost=None)
        return judge(response.status_code, response.headers, raw, self.endpoint)


def say(message: dict[str, Any]) -> None:
    """One line to the parent, if there still is one; what matters is in the journal all the same."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def told() -> Iterator[dict[str, Any]]:
    """The parent's messages, read without Python's buffer: a waiting thread would keep its lock at exit."""
    partial_line = b""
    while data := os.read(0, 1 << 16):
        *lines, partial_line = (partial_line + data).split(b"\n")
        yield from map(json.loads, lines)


async def _requests(courier: Courier, messages: Iterator[dict[str, Any]]) -> AsyncIterator[TeacherRequest]:
    """The requests among the parent's messages, until it says that there are no more."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    room = threading.Semaphore(2 * WAITING)

    def read() -> None:
        for message in messages:
            room.acquire()
            loop.call_soon_threadsafe(queue.put_nowait, message)
        loop.call_soon_threadsafe(courier.end, "parent")
        loop.call_soon_threadsafe(queue.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    prompts: dict[str, tuple[tuple[str, str], ...]] = {}
    while (message := await queue.get()) is not None and "end" not in message:
        room.release()
        if "prompt" in message:
            prompts[message["id"]] = tuple((role, text) for role, text in message["prompt"])
        else:
            yield TeacherRequest(
                message["id"],
                prompts[message["of"]],
                message["user"],
                message["max_tokens"],
                message["image"],
                message["image_key"],
            )


async def _watch(courier: Courier, parent: int) -> None:
    """End when the parent has died, though standard input may still hold requests."""
    while os.getppid() == parent or sys.platform == "win32":
        await asyncio.sleep(0.02)
    courier.end("parent")


async def _run(settings: dict[str, Any], messages: Iterator[dict[str, Any]], journal: Journal) -> None:
    known = {f.name for f in fields(Endpoint)}
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    courier = Courier(Endpoint(**{key: v for key, v in values.items() if key in known}), journal)
    watch = asyncio.create_task(_watch(courier, settings["parent"]))
    if sys.platform != "win32":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, courier.end, "interrupted")
    await courier.run(_requests(courier, messages))
    watch.cancel()
    say(courier.stopped or {"finished": True})


def main() -> None:
    path = Path(sys.argv[1])
    messages = told()
    settings = next(messages, None)
    if settings is None:
        return
    lock = Lock(path.with_suffix(".lock"))
    lock.wait(settings["timeout"] + 60, lambda: None)
    if os.getppid() != settings["parent"] and sys.platform != "win32":
        return  # killed before the first call
    journal = Journal(path)
    journal.settle()
    try:
        asyncio.run(_run(settings, messages, journal))
    except OSError as error:
        say(
            {
                "stopped": "work",
                "message": f"the journal '{path}' cannot be written: {error.strerror or error}",
            }
        )


if __name__ == "__main__":
    main()
