"""One request that the engine is answering, and the response that streams it.

The engine's thread puts tokens into a queue of the request, and the event loop reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pumice.engine.text import TextStream
from pumice.serve.answers import DONE, AnswerPiece, ChatForm, CompletionForm, event
from pumice.serve.errors import ApiError
from pumice.serve.metrics import Metrics
from pumice.serve.observe import RequestRecord, internal_error
from pumice.serve.protocol import LogprobEntry, PromptDetails, PromptProgress, TopLogprob, Usage

if TYPE_CHECKING:
    from pumice.engine.engine import Engine
    from pumice.engine.requests import Delta, Prompt
    from pumice.engine.sampling import TokenLogprob
    from pumice.tokens import Tokenizer

T = TypeVar("T")

SEND_GRACE = 10.0  # seconds to send the end of an answer after its time is over
PROGRESS_INTERVAL = 0.2  # seconds between two looks at how much of a prompt is read


class ActiveRequest:
    """A request in the engine. `next` returns the next piece of its answer.

    timeout: seconds from the arrival of the request to the end of its answer.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: Prompt,
        record: RequestRecord,
        metrics: Metrics,
        timeout: float,
    ) -> None:
        self.record, self._timeout = record, timeout
        self._engine, self._tokenizer, self._prompt, self._metrics = engine, tokenizer, prompt, metrics
        self._text = TextStream(tokenizer.decode, prompt.params.stop)
        self._open = True
        self._deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may end before the engine
                loop.call_soon_threadsafe(self._deltas.put_nowait, delta)

        self._request = engine.submit(prompt, deliver)
        self._timer = loop.call_later(self.seconds_left, self._deltas.put_nowait, None)

    @property
    def seconds_left(self) -> float:
        """Seconds left of the request's time."""
        return max(0.0, self._timeout - self.record.seconds)

    async def next(self) -> AnswerPiece:
        """Return the next piece. The last one has `finish`. Raises ApiError, or the error of the engine."""
        delta = await self._deltas.get()
        if delta is None:
            message = f"the answer took longer than {self._timeout:g} s; ask for a shorter one"
            raise ApiError(504, message, code="timeout")
        first = not self._text.tokens
        text = self._text.add(delta)
        finish = self._text.finish
        if self._text.error is not None:
            raise self._text.error
        # The engine is closing. (A request that `end` cancels never gets here.)
        if finish == "cancelled":
            raise ApiError(503, "the server is about to stop; ask again soon", code="draining")
        assert finish != "error"  # which comes with its exception
        if first and self._text.tokens:
            seconds = self.record.seconds
            self.record.fields["first_token_seconds"] = round(seconds, 4)
            self._metrics.first_token.observe(seconds)
        return AnswerPiece(text, tuple(map(self._entry, delta.logprobs or ())), finish)

    async def pieces(self, return_progress: bool = False) -> AsyncIterator[AnswerPiece | PromptProgress]:
        """Yield the pieces of the answer, and with `return_progress` before them how far the prompt is read.

        The progress begins only when a part of the prompt is computed: before, an error can still be the
        status of the response. Raises as `next`.
        """
        first, read = asyncio.ensure_future(self.next()), 0
        try:
            while return_progress and not (await asyncio.wait({first}, timeout=PROGRESS_INTERVAL))[0]:
                total, computed = len(self._prompt.input_ids), self._request.computed
                if read < computed < total:
                    read = computed
                    yield PromptProgress(total=total, processed=computed)
            piece = await first
        finally:
            first.cancel()
        yield piece
        while piece.finish is None:
            piece = await self.next()
            yield piece

    def usage(self) -> Usage:
        prompt, completion = len(self._prompt.input_ids), self._text.tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=self._text.cached_tokens),
        )

    def end(self) -> None:
        """Free the request's slot in the engine and count its tokens. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        self._timer.cancel()
        if self._request.finish is None:
            self._engine.cancel(self._request)
            if self._text.finish is None:
                self._metrics.cancelled.inc()
        counts = {
            "prompt_tokens": len(self._prompt.input_ids),
            "cached_tokens": self._text.cached_tokens,
            "completion_tokens": self._text.tokens,
        }
        self.record.fields |= counts
        counters = (self._metrics.prompt, self._metrics.cached, self._metrics.generated)
        for counter, count in zip(counters, counts.values(), strict=True):
            counter.inc(count)

    def _entry(self, token: TokenLogprob) -> LogprobEntry:
        top = [TopLogprob(**self._scored(token_id, logprob)) for token_id, logprob in token.top]
        return LogprobEntry(**self._scored(token.token, token.logprob), top_logprobs=top)

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = self._tokenizer.decode([token_id]), self._tokenizer.token_bytes(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}


class EventStream(StreamingResponse):
    """The answer as server-sent events. It always ends its request, even if no event is sent."""

    def __init__(
        self,
        running: ActiveRequest,
        form: ChatForm | CompletionForm,
        first: AnswerPiece | PromptProgress,
        others: AsyncIterator[AnswerPiece | PromptProgress],
    ) -> None:
        self._running = running
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            _events(running, form, first, others), media_type="text/event-stream", headers=headers
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The timer of the request has no effect while a slow client blocks the sending. This limit has.
            with anyio.move_on_after(self._running.seconds_left + SEND_GRACE):
                await super().__call__(scope, receive, send)
        finally:
            self._running.end()


async def _events(
    running: ActiveRequest,
    form: ChatForm | CompletionForm,
    first: AnswerPiece | PromptProgress,
    others: AsyncIterator[AnswerPiece | PromptProgress],
) -> AsyncIterator[bytes]:
    def event_of(piece: AnswerPiece | PromptProgress) -> bytes:
        if isinstance(piece, PromptProgress):
            return form.progress_event(piece)
        return form.event(piece) if piece.has_content else b""

    try:
        yield form.first_event() + event_of(first)
        async for piece in others:
            if data := event_of(piece):
                yield data
        yield (form.usage_event(running.usage()) if form.include_usage else b"") + DONE
    except ApiError as error:
        running.record.add_error(error)
        yield event(error.body())
    except Exception as error:  # too late for a status: send an event, and log the trace
        running.record.error = error
        yield event(internal_error(running.record).body())


async def run_while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If the client disconnects first, cancel it and raise ClientDisconnect."""
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
