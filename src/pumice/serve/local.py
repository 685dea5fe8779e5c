"""The backend that answers with the engine in this process.

Each request has a queue: the engine's thread puts tokens into it, and the event loop reads them. A pool of
threads decodes pictures and long texts, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pumice.conversation import Conversation, ImagePart, Message
from pumice.errors import InputError
from pumice.serve.answers import DONE, AnswerForm, AnswerPiece, ScoredToken, usage
from pumice.serve.backend import Call, run_while_connected
from pumice.serve.errors import ApiError, unknown_model, validation_error
from pumice.serve.explanation import explanation_json
from pumice.serve.fetch import Fetcher
from pumice.serve.images import find_damaged, read_images
from pumice.serve.metrics import BackendStats, Metrics
from pumice.serve.observe import internal_error
from pumice.serve.protocol import (
    BaseRequest,
    ChatRequest,
    CompletionRequest,
    ConversationRequest,
    ExplainRequest,
    GenerationRequest,
    ResponseFormat,
    TextPart,
)
from pumice.serve.settings import ServerSettings

if TYPE_CHECKING:
    from pumice.assistant import Assistant
    from pumice.engine.constraint import JsonSchema
    from pumice.engine.requests import Delta, Prompt

T = TypeVar("T", bound=BaseRequest)

LONG_BODY = 1 << 15  # bytes; parsing a longer body would block the event loop for too long
MAX_SCHEMAS = 32  # compiled JSON schemas in the cache
SEND_GRACE = 10.0  # seconds to send the end of an answer after its time is over
PROMPT_THREADS = 2  # threads that prepare prompts; each may hold a decoded picture


class LocalBackend:
    """A backend that uses an assistant's engine. names: those of the model, the default one first."""

    def __init__(self, assistant: Assistant, names: tuple[str, ...], settings: ServerSettings) -> None:
        self.assistant, self.names, self.settings = assistant, names, settings
        self.engine = assistant.engine
        self._fetcher: Fetcher | None = None
        self._schemas: OrderedDict[str, JsonSchema] = OrderedDict()

    async def start(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._pool = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="pumice-prompts")
        self._explain_pool = ThreadPoolExecutor(1, thread_name_prefix="pumice-explain")
        if self.settings.allow_image_urls:
            self._fetcher = Fetcher(size=self.settings.max_body, seconds=self.settings.image_timeout)
        self.engine.start()

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        for pool in (self._pool, self._explain_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher is not None:
            await self._fetcher.close()

    async def models(self) -> list[str]:
        return list(self.names)

    async def ready(self) -> bool:
        return True

    def stats(self) -> BackendStats:
        stats = self.engine.stats()
        return BackendStats(
            stats.running,
            stats.waiting,
            stats.cached_tokens,
            stats.cache_capacity,
            stats.prefix_hits,
            stats.evictions,
            stats.steps,
        )

    async def chat(self, call: Call) -> Response:
        return await run_while_connected(call.request, self._chat(call))

    async def complete(self, call: Call) -> Response:
        return await run_while_connected(call.request, self._complete(call))

    async def explain(self, call: Call) -> Response:
        return await run_while_connected(call.request, self._explain(call))

    async def _chat(self, call: Call) -> Response:
        request = await self._parse(ChatRequest, call.body)
        sampling = self._sampling(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        if request.logprobs:
            sampling["logprobs"] = request.top_logprobs or 0
        constraint = await self._compile_schema(request.response_format)
        params, files = await self._read_images(call, request)
        try:
            prompt = await self._run_in_pool(self._chat_prompt, request, files, sampling, constraint)
        except InputError as error:
            raise await self._image_error(error, params, files, "messages") from error
        form = self._answer_form("chat", request, bool(request.logprobs))
        return await self._answer(call, request, prompt, form, params, files)

    async def _complete(self, call: Call) -> Response:
        request = await self._parse(CompletionRequest, call.body)
        sampling = self._sampling(request)
        if request.logprobs is not None:
            sampling["logprobs"] = request.logprobs
        try:
            prompt = await self._run_in_pool(self._text_prompt, request.text, sampling)
        except InputError as error:
            raise ApiError(400, str(error), param="prompt") from error
        form = self._answer_form("text", request, request.logprobs is not None)
        return await self._answer(call, request, prompt, form, [], [])

    async def _explain(self, call: Call) -> Response:
        request = await self._parse(ExplainRequest, call.body)
        params, files = await self._read_images(call, request)
        limit, loop = self.settings.timeout, asyncio.get_running_loop()
        try:
            with anyio.fail_after(max(0.0, limit - call.record.seconds)):
                explanation = await loop.run_in_executor(
                    self._explain_pool, self._explanation, request, files
                )
        except InputError as error:
            raise await self._image_error(error, params, files, "messages") from error
        except TimeoutError:
            raise ApiError(
                504, f"the explanation took longer than {limit:g} s; ask about a shorter one", code="timeout"
            ) from None
        return Response(explanation, media_type="application/json")

    def _explanation(self, request: ExplainRequest, files: list[bytes]) -> bytes:
        *context, answer = conversation(request, files).messages
        if answer.role != "assistant":
            raise InputError("the last message must be the assistant's, the answer to explain")
        values = explanation_json(self.assistant, Conversation(tuple(context)), answer.text)
        return json.dumps(values, ensure_ascii=False).encode()

    async def _read_images(self, call: Call, request: ConversationRequest) -> tuple[list[str], list[bytes]]:
        """Return the field name of each picture of a conversation, and the bytes of each file."""
        files = await read_images(request.images, self.settings, self._fetcher, self._pool)
        call.record.fields["pictures"] = len(files)
        self.metrics.images.inc(len(files))
        return [param for param, _ in request.images], files

    async def _run_in_pool(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, functools.partial(work, *arguments)
        )

    async def _parse(self, kind: type[T], body: bytes) -> T:
        """Return the body as a request of this kind. Raises ApiError that names the wrong field."""
        try:
            if len(body) < LONG_BODY:
                request = kind.model_validate_json(body)
            else:
                request = await self._run_in_pool(kind.model_validate_json, body)
        except ValidationError as error:
            raise validation_error(error) from None
        if request.model is not None and request.model not in self.names:
            raise unknown_model(request.model, self.names)
        return request

    def _answer_form(self, kind: Any, request: GenerationRequest, logprobs: bool) -> AnswerForm:
        return AnswerForm(kind, request.model or self.names[0], logprobs, request.include_usage_in_stream)

    def _sampling(self, request: GenerationRequest) -> dict[str, Any]:
        """Return the fields of SamplingParams that the request sets. Raises ApiError for too many tokens."""
        name, limit = request.limit
        if limit is not None and limit > self.settings.max_tokens:
            raise ApiError(
                400,
                f"{name} is {limit}, this server allows {self.settings.max_tokens}; ask for fewer",
                param=name,
                code="too_many_tokens",
            )
        values = {
            "max_new_tokens": limit or self.settings.default_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "seed": None if request.seed is None else request.seed % 2**63,
            "stop": request.stops,
        }
        return {key: value for key, value in values.items() if value is not None}

    def _chat_prompt(
        self,
        request: ChatRequest,
        files: list[bytes],
        sampling: dict[str, Any],
        constraint: JsonSchema | None,
    ) -> Prompt:
        prompt = self.assistant.prompt(conversation(request, files), **sampling)
        return prompt if constraint is None else dataclasses.replace(prompt, constraint=constraint)

    async def _compile_schema(self, response_format: ResponseFormat | None) -> JsonSchema | None:
        """Return the constraint that a response_format asks for. The last ones used stay in a cache."""
        if response_format is None or response_format.type == "text":
            return None
        schema = None if response_format.json_schema is None else response_format.json_schema.schema_
        key = json.dumps(schema, sort_keys=True)
        if key not in self._schemas:
            try:
                constraint = await self._run_in_pool(self.assistant.json, schema)
            except InputError as error:
                raise ApiError(
                    400, str(error), param="response_format", code="invalid_json_schema"
                ) from error
            while len(self._schemas) >= MAX_SCHEMAS:
                self._schemas.popitem(last=False)
            self._schemas[key] = constraint
        self._schemas.move_to_end(key)
        return self._schemas[key]

    def _text_prompt(self, text: str, sampling: dict[str, Any]) -> Prompt:
        import torch

        from pumice.engine.requests import Prompt, check_room
        from pumice.engine.sampling import SamplingParams

        bos = self.assistant.processor.config.bos_token_id
        ids = [] if bos is None else [bos]
        ids += [token_id for token_id, _ in self.assistant.processor.tokenizer.pieces(text)]
        if not ids:
            raise InputError("the prompt is empty; give some text to continue")
        prompt = Prompt(
            torch.tensor(ids, dtype=torch.int64),
            params=SamplingParams(**{**self.assistant.generation, **sampling}),
        )
        check_room(self.assistant.model, prompt)
        return prompt

    async def _image_error(
        self, error: InputError, params: list[str], files: list[bytes], field: str
    ) -> ApiError:
        """Return the error for the client. If a picture is damaged, `param` names its field."""
        damaged_field = await self._run_in_pool(find_damaged, params, files) if files else None
        return ApiError(
            400, str(error), param=damaged_field or field, code="invalid_image" if damaged_field else None
        )

    async def _answer(
        self,
        call: Call,
        request: GenerationRequest,
        prompt: Prompt,
        form: AnswerForm,
        params: list[str],
        files: list[bytes],
    ) -> Response:
        # 1. Give the prompt to the engine.
        try:
            running = _ActiveRequest(self, call, prompt)
        except InputError as error:  # the prompt, or prompt and answer, do not fit into the KV cache
            prompt_field = "prompt" if isinstance(request, CompletionRequest) else "messages"
            too_long = len(prompt.input_ids) > self.engine.stats().cache_capacity
            raise ApiError(400, str(error), param=prompt_field if too_long else request.limit[0]) from error
        try:
            # 2. Wait for the first piece. Until then an error can still change the status of the response.
            first = await running.next()
            if request.stream:
                return _Events(self._events(running, form, first), running)
            # 3. Without a stream, collect all pieces and send one object.
            pieces = [first]
            while pieces[-1].finish is None:
                pieces.append(await running.next())
            running.end()
            return JSONResponse(form.response(pieces, running.usage()))
        except BaseException as error:  # also a cancellation, after the client disconnects
            running.end()
            if isinstance(error, InputError):  # a picture that could not be decoded
                raise await self._image_error(error, params, files, "messages") from error
            raise

    async def _events(
        self, running: _ActiveRequest, form: AnswerForm, piece: AnswerPiece
    ) -> AsyncIterator[bytes]:
        try:
            yield form.first_event() + (form.event(piece) if piece.has_content else b"")
            while piece.finish is None:
                piece = await running.next()
                if piece.has_content:
                    yield form.event(piece)
            yield (form.usage_event(running.usage()) if form.include_usage else b"") + DONE
        except ApiError as error:
            running.record.add_error(error)
            yield form.error_event(error.body())
        except Exception as error:  # too late for a status: send an event, and log the trace
            running.record.error = error
            yield form.error_event(internal_error(running.record).body())


class _Events(StreamingResponse):
    """A stream of server-sent events. It always ends its request, even if no event is sent."""

    def __init__(self, events: AsyncIterator[bytes], running: _ActiveRequest) -> None:
        self._running = running
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The timer of the request has no effect while a slow client blocks the sending. This limit has.
            with anyio.move_on_after(self._running.seconds_left + SEND_GRACE):
                await super().__call__(scope, receive, send)
        finally:
            self._running.end()


class _ActiveRequest:
    """A request that the engine is answering. `next` returns the next piece of the answer."""

    def __init__(self, backend: LocalBackend, call: Call, prompt: Prompt) -> None:
        from pumice.engine.text import TextStream

        self.record, self._backend, self._prompt = call.record, backend, prompt
        self._decode = backend.assistant.processor.tokenizer.decode
        self._text = TextStream(self._decode, prompt.params.stop)
        self._open = True
        self._deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may end before the engine
                loop.call_soon_threadsafe(self._deltas.put_nowait, delta)

        self._request = backend.engine.submit(prompt, deliver)
        self._timer = loop.call_later(self.seconds_left, self._deltas.put_nowait, None)

    @property
    def seconds_left(self) -> float:
        """Seconds left of the request's time."""
        return max(0.0, self._backend.settings.timeout - self.record.seconds)

    async def next(self) -> AnswerPiece:
        """Return the next piece. The last one has `finish`. Raises ApiError, or the error of the engine."""
        delta = await self._deltas.get()
        if delta is None:
            limit = self._backend.settings.timeout
            raise ApiError(
                504, f"the answer took longer than {limit:g} s; ask for a shorter one", code="timeout"
            )
        first = not self._text.tokens
        text = self._text.add(delta)
        if self._text.error is not None:
            raise self._text.error
        # The engine is closing. (A request that `end` cancels never gets here.)
        if self._text.finish == "cancelled":
            raise ApiError(503, "the server is about to stop; ask again soon", code="draining")
        if first and self._text.tokens:
            seconds = self.record.seconds
            self.record.fields["first_token_seconds"] = round(seconds, 4)
            self._backend.metrics.first_token.observe(seconds)
        scored = tuple(self._scored_token(token) for token in delta.logprobs or ())
        return AnswerPiece(text, scored, self._text.finish)

    def usage(self) -> dict[str, Any]:
        return usage(len(self._prompt.input_ids), self._text.tokens, self._text.cached_tokens)

    def end(self) -> None:
        """Free the request's slot in the engine and count its tokens. A second call does nothing."""
        if not self._open:
            return
        self._open = False
        self._timer.cancel()
        backend = self._backend
        if self._request.finish is None:
            backend.engine.cancel(self._request)
            if self._text.finish is None:
                backend.metrics.cancelled.inc()
        token_usage = self.usage()
        cached = token_usage["prompt_tokens_details"]["cached_tokens"]
        self.record.fields |= {
            "prompt_tokens": token_usage["prompt_tokens"],
            "cached_tokens": cached,
            "completion_tokens": token_usage["completion_tokens"],
        }
        backend.metrics.prompt.inc(token_usage["prompt_tokens"])
        backend.metrics.cached.inc(cached)
        backend.metrics.generated.inc(token_usage["completion_tokens"])

    def _scored_token(self, token: Any) -> ScoredToken:
        top = tuple((self._decode([token_id]), logprob) for token_id, logprob in token.top)
        return ScoredToken(self._decode([token.token]), token.logprob, top)


def conversation(request: ConversationRequest, files: list[bytes]) -> Conversation:
    """Return the messages of a request as a Conversation. files: its pictures, in order.

    The role "developer" becomes "system". System messages at the front become one. `<image>` in a text is
    plain text, not a placeholder.
    """
    remaining_files = iter(files)
    messages: list[Message] = []
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            parts: tuple[str | ImagePart, ...] = (message.content,)
        else:
            parts = tuple(
                part.text if isinstance(part, TextPart) else ImagePart(next(remaining_files))
                for part in message.content
            )
        if role == "system" and len(messages) == 1 and messages[0].role == "system":
            messages[0] = Message("system", (*messages[0].parts, "\n\n", *parts))
        else:
            messages.append(Message(role, parts))
    return Conversation(tuple(messages))
