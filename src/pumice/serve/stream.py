"""A request that the engine is answering, once or several times, and the response that streams it.

The engine's thread puts tokens into a queue of the request, and the event loop reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pumice.engine.text import TextStream
from pumice.errors import InputError
from pumice.serve.answers import AnswerForm, AnswerPiece
from pumice.serve.errors import ApiError, invalid, is_stopping, timed_out
from pumice.serve.metrics import Metrics
from pumice.serve.observe import RequestRecord, internal_error, request_record
from pumice.serve.protocol import LogprobEntry, PromptDetails, PromptProgress, TopLogprob, Usage

if TYPE_CHECKING:
    from pumice.engine.engine import Engine
    from pumice.engine.requests import Delta, Prompt
    from pumice.engine.requests import Request as EngineRequest
    from pumice.engine.sampling import TokenLogprob
    from pumice.tokens import Tokenizer

T = TypeVar("T")

SEND_GRACE = 10.0  # seconds to send the end of an answer after its time is over
PROGRESS_INTERVAL = 0.2  # seconds between two looks at how much of a prompt is read


PieceReader = Callable[[AnswerPiece], AnswerPiece]


def as_text(piece: AnswerPiece) -> AnswerPiece:
    """Return the piece: an answer that is text."""
    return piece


@dataclass
class Echo:
    """Puts the prompt before an answer. alone: the answer itself is left out, of whose tokens there is one.

    text: the prompt. tokens: their number.
    """

    text: str
    tokens: int
    alone: bool

    def __call__(self, piece: AnswerPiece) -> AnswerPiece:
        text, self.text = self.text, ""
        if self.alone:
            return replace(piece, text=text, tokens=piece.tokens[: self.tokens - 1], finish="length")
        return replace(piece, text=text + piece.text)


class ActiveRequest:
    """A request in the engine. `next` returns the next piece of one of its answers.

    prompts: one for each answer; equal ones are computed once. readers: what each answer's pieces go through.
    timeout: seconds from the arrival of the request to the end of its answers.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        readers: Sequence[PieceReader],
        record: RequestRecord,
        metrics: Metrics,
        timeout: float,
    ) -> None:
        self.record, self._timeout = record, timeout
        self._engine, self._tokenizer, self._prompts, self._metrics = engine, tokenizer, prompts, metrics
        self._readers = readers
        self._texts = [TextStream(tokenizer.decode, prompt.params.stop, prompt.prefix) for prompt in prompts]
        self._open = True
        self._deltas: asyncio.Queue[tuple[int, Delta] | ApiError] = asyncio.Queue()
        self._requests: list[EngineRequest] = []
        loop = asyncio.get_running_loop()

        def deliver(index: int, delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may end before the engine
                loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))

        self._timer = loop.call_later(self.seconds_left, self._deltas.put_nowait, timed_out(timeout))
        try:
            for index, prompt in enumerate(prompts):
                self._requests.append(engine.submit(prompt, functools.partial(deliver, index)))
        except BaseException:
            self._timer.cancel()
            for request in self._requests:
                engine.cancel(request)
            raise

    @property
    def done(self) -> bool:
        return all(text.finish is not None for text in self._texts)

    @property
    def seconds_left(self) -> float:
        """Seconds left of the request's time."""
        return max(0.0, self._timeout - self.record.seconds)

    async def next(self) -> AnswerPiece:
        """Return the next piece of an answer; the last one of each has `finish`.

        Raises ApiError, or the error of the engine.
        """
        # 1. Wait for tokens of an answer that goes on.
        while True:
            item = await self._deltas.get()
            if isinstance(item, ApiError):
                raise item
            index, delta = item
            text = self._texts[index]
            if text.finish is None:
                break
        # 2. Turn them into text.
        first = not any(text.tokens for text in self._texts)
        begins = not text.tokens
        new_text = text.add(delta)
        if text.error is not None:
            raise text.error
        # The engine is closing. (A request that `end` cancels never gets here.)
        if text.finish == "cancelled":
            raise is_stopping()
        assert text.finish != "error"  # which comes with its exception
        if text.finish is not None and delta.finish is None:  # a stop string: the engine need not go on
            self._engine.cancel(self._requests[index])
        if first and text.tokens:
            seconds = self.record.seconds
            self.record.fields["first_token_seconds"] = round(seconds, 4)
            self._metrics.first_token.observe(seconds)
        entries = tuple(map(self._entry, delta.logprobs or ()))
        piece = AnswerPiece(index, new_text, tokens=entries, finish=text.finish, stop=text.stop)
        # 3. The tokens of a prompt come before those of its answer.
        prompt = self._prompts[index]
        if begins and prompt.params.prompt_logprobs is not None:
            scored = tuple(map(self._entry, self._requests[index].prompt_logprobs))
            first_token = self._tokenizer.decode(prompt.input_ids[:1].tolist())
            piece = replace(piece, first=first_token, tokens=scored + entries)
        return self._readers[index](piece)

    def stop(self) -> None:
        """Let `next` raise, because the server stops."""
        self._deltas.put_nowait(is_stopping())

    async def pieces(self, return_progress: bool = False) -> AsyncIterator[AnswerPiece | PromptProgress]:
        """Yield the pieces of all answers, and with `return_progress` before them how far the prompt is read.

        The progress begins only when a part of the prompt is computed: before, an error can still be the
        status of the response. Raises as `next`.
        """
        first, read = asyncio.ensure_future(self.next()), 0
        try:
            while return_progress and not (await asyncio.wait({first}, timeout=PROGRESS_INTERVAL))[0]:
                total, computed = len(self._prompts[0].input_ids), self._requests[0].computed
                if read < computed < total:
                    read = computed
                    yield PromptProgress(total=total, processed=computed)
            piece = await first
        finally:
            first.cancel()
        yield piece
        while not self.done:
            yield await self.next()

    def usage(self) -> Usage:
        counts = self._counts()
        return Usage(
            prompt_tokens=counts["prompt_tokens"],
            completion_tokens=counts["completion_tokens"],
            total_tokens=counts["prompt_tokens"] + counts["completion_tokens"],
            prompt_tokens_details=PromptDetails(cached_tokens=counts["cached_tokens"]),
        )

    def end(self) -> None:
        """Free the request's slots in the engine and count its tokens. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        self._timer.cancel()
        for request, text in zip(self._requests, self._texts, strict=False):
            if request.finish is None:
                self._engine.cancel(request)
                if text.finish is None:
                    self._metrics.cancelled.inc()
        counts = self._counts()
        self.record.fields |= counts
        counters = (self._metrics.prompt, self._metrics.cached, self._metrics.generated)
        for counter, count in zip(counters, counts.values(), strict=True):
            counter.inc(count)

    def _counts(self) -> dict[str, int]:
        """Return the numbers of tokens. A prompt that several answers share counts once."""
        firsts = {id(prompt.input_ids): number for number, prompt in reversed(list(enumerate(self._prompts)))}
        return {
            "prompt_tokens": sum(len(self._prompts[number].input_ids) for number in firsts.values()),
            "cached_tokens": sum(self._texts[number].cached_tokens for number in firsts.values()),
            "completion_tokens": sum(text.tokens for text in self._texts),
        }

    def _entry(self, token: TokenLogprob) -> LogprobEntry:
        top = [TopLogprob(**self._scored(token_id, logprob)) for token_id, logprob in token.top]
        return LogprobEntry(**self._scored(token.token, token.logprob), top_logprobs=top)

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = self._tokenizer.decode([token_id]), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}


class EventStream(StreamingResponse):
    """The answers as a stream. It always ends its request, even if nothing is sent."""

    def __init__(
        self,
        running: ActiveRequest,
        form: AnswerForm,
        first: AnswerPiece | PromptProgress,
        others: AsyncIterator[AnswerPiece | PromptProgress],
    ) -> None:
        self._running, self._form = running, form
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(first, others), media_type=form.media_type, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._running.record.stop = self._running.stop
        try:
            # The timer of the request has no effect while a slow client blocks the sending. This limit has.
            with anyio.move_on_after(self._running.seconds_left + SEND_GRACE):
                await super().__call__(scope, receive, send)
        finally:
            self._running.end()

    async def _events(
        self, first: AnswerPiece | PromptProgress, others: AsyncIterator[AnswerPiece | PromptProgress]
    ) -> AsyncIterator[bytes]:
        running, form = self._running, self._form
        try:
            yield form.begin(running.usage()) + self._data(first)
            async for piece in others:
                if data := self._data(piece):
                    yield data
            yield form.end(running.usage())
        except ApiError as error:
            running.record.add_error(error)
            yield form.error(error.body())
        except InputError as error:  # of its own settings, such as a schema
            refused = invalid(None, str(error))
            running.record.add_error(refused)
            yield form.error(refused.body())
        except Exception as error:  # too late for a status: send an event, and log the trace
            running.record.error = error
            yield form.error(internal_error(running.record).body())

    def _data(self, piece: AnswerPiece | PromptProgress) -> bytes:
        if isinstance(piece, PromptProgress):
            return self._form.progress(piece)
        return self._form.piece(piece) if piece.has_content else b""


async def run_while_connected(request: Request, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Return the result of `work`. Cancel it if the client disconnects first or the request's time is over.

    Raises ClientDisconnect, or ApiError, 504, when the request is `timeout` seconds old.
    """
    left = max(0.0, timeout - request_record(request).seconds)
    with anyio.move_on_after(left):
        return await _while_connected(request, work)
    raise timed_out(timeout)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for future in (task, disconnect):
            future.cancel()
        for future in (task, disconnect):
            with contextlib.suppress(BaseException):
                await future


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
