"""Answers from the engine in this process.

Knows how a request becomes a prompt and how tokens become an answer. The engine's thread and the event loop
meet in one place: a queue per request. Pictures and long texts are read in a pool of threads.
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

from pumice.conversation import Conversation, Message
from pumice.conversation import ImagePart as Shown
from pumice.errors import InputError
from pumice.explain.page import explanation_json
from pumice.serve import pictures
from pumice.serve.answers import DONE, Piece, Scored, Shape, usage
from pumice.serve.backend import Call, attended
from pumice.serve.errors import ApiError, invalid, no_model
from pumice.serve.fetch import Fetcher
from pumice.serve.metrics import Levels, Metrics
from pumice.serve.observe import internal
from pumice.serve.protocol import (
    Asking,
    ChatRequest,
    CompletionRequest,
    Dialogue,
    ExplainRequest,
    Generation,
    ResponseFormat,
    TextPart,
)
from pumice.serve.settings import Settings

if TYPE_CHECKING:
    from pumice.assistant import Assistant
    from pumice.engine.generate import Prompt
    from pumice.engine.requests import Delta
    from pumice.structured import JsonSchema

T = TypeVar("T", bound=Asking)

LONG = 1 << 15  # bytes of a body above which reading it would hold up the others
FORMS = 32  # JSON schemas that are kept ready
GRACE = 10.0  # seconds to send the last of an answer
THREADS = 2  # that prepare prompts: each may hold a decoded picture


class Local:
    """A backend that is an assistant's engine. names: what the model is called, the usual one first."""

    def __init__(self, assistant: Assistant, names: tuple[str, ...], settings: Settings) -> None:
        self.assistant, self.names, self.settings = assistant, names, settings
        self.engine = assistant.engine
        self._fetcher: Fetcher | None = None
        self._forms: OrderedDict[str, JsonSchema] = OrderedDict()

    async def start(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="pumice-prompts")
        self._explaining = ThreadPoolExecutor(1, thread_name_prefix="pumice-explain")
        if self.settings.allow_image_urls:
            self._fetcher = Fetcher(size=self.settings.max_body, seconds=self.settings.image_timeout)
        self.engine.start()

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        for pool in (self._pool, self._explaining):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher is not None:
            await self._fetcher.close()

    async def models(self) -> list[str]:
        return list(self.names)

    async def ready(self) -> bool:
        return True

    def levels(self) -> Levels:
        now = self.engine.stats()
        return Levels(
            now.running,
            now.waiting,
            now.cached_tokens,
            now.cache_capacity,
            now.prefix_hits,
            now.evictions,
            now.steps,
        )

    async def chat(self, call: Call) -> Response:
        return await attended(call.request, self._chat(call))

    async def complete(self, call: Call) -> Response:
        return await attended(call.request, self._complete(call))

    async def explain(self, call: Call) -> Response:
        return await attended(call.request, self._explain(call))

    async def _chat(self, call: Call) -> Response:
        asked = await self._parse(ChatRequest, call.body)
        sampling = self._sampling(asked)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        if asked.logprobs:
            sampling["logprobs"] = asked.top_logprobs or 0
        constraint = await self._form(asked.response_format)
        params, files = await self._pictures(call, asked)
        try:
            prompt = await self._apart(self._chat_prompt, asked, files, sampling, constraint)
        except InputError as error:
            raise await self._wrong(error, params, files, "messages") from error
        shape = self._shape("chat", asked, bool(asked.logprobs))
        return await self._answer(call, asked, prompt, shape, params, files)

    async def _complete(self, call: Call) -> Response:
        asked = await self._parse(CompletionRequest, call.body)
        sampling = self._sampling(asked)
        if asked.logprobs is not None:
            sampling["logprobs"] = asked.logprobs
        try:
            prompt = await self._apart(self._text_prompt, asked.text, sampling)
        except InputError as error:
            raise ApiError(400, str(error), param="prompt") from error
        shape = self._shape("text", asked, asked.logprobs is not None)
        return await self._answer(call, asked, prompt, shape, [], [])

    async def _explain(self, call: Call) -> Response:
        asked = await self._parse(ExplainRequest, call.body)
        params, files = await self._pictures(call, asked)
        limit, loop = self.settings.timeout, asyncio.get_running_loop()
        try:
            with anyio.fail_after(max(0.0, limit - call.record.seconds)):
                found = await loop.run_in_executor(self._explaining, self._explanation, asked, files)
        except InputError as error:
            raise await self._wrong(error, params, files, "messages") from error
        except TimeoutError:
            raise ApiError(
                504, f"the explanation took longer than {limit:g} s; ask about a shorter one", code="timeout"
            ) from None
        return Response(found, media_type="application/json")

    def _explanation(self, asked: ExplainRequest, files: list[bytes]) -> bytes:
        *before, said = conversation(asked, files).messages
        if said.role != "assistant":
            raise InputError("the last message must be the assistant's, the answer to explain")
        found = explanation_json(self.assistant, Conversation(tuple(before)), said.text)
        return json.dumps(found, ensure_ascii=False).encode()

    async def _pictures(self, call: Call, asked: Dialogue) -> tuple[list[str], list[bytes]]:
        """The fields of a conversation's pictures, and their files."""
        files = await pictures.read(asked.images, self.settings, self._fetcher, self._pool)
        call.record.fields["pictures"] = len(files)
        self.metrics.pictures.inc(len(files))
        return [param for param, _ in asked.images], files

    async def _apart(self, work: Callable[..., Any], *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(work, *given))

    async def _parse(self, kind: type[T], body: bytes) -> T:
        try:
            if len(body) < LONG:
                asked = kind.model_validate_json(body)
            else:
                asked = await self._apart(kind.model_validate_json, body)
        except ValidationError as error:
            raise invalid(error) from None
        if asked.model is not None and asked.model not in self.names:
            raise no_model(asked.model, self.names)
        return asked

    def _shape(self, kind: Any, asked: Generation, logprobs: bool) -> Shape:
        return Shape(kind, asked.model or self.names[0], logprobs, asked.usage_wanted)

    def _sampling(self, asked: Generation) -> dict[str, Any]:
        """The request's fields as those of SamplingParams."""
        name, limit = asked.limit
        if limit is not None and limit > self.settings.max_tokens:
            raise ApiError(
                400,
                f"{name} is {limit}, this server allows {self.settings.max_tokens}; ask for fewer",
                param=name,
                code="too_many_tokens",
            )
        wanted = {
            "max_new_tokens": limit or self.settings.default_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "repetition_penalty": asked.repetition_penalty,
            "seed": None if asked.seed is None else asked.seed % 2**63,
            "stop": asked.stops,
        }
        return {key: value for key, value in wanted.items() if value is not None}

    def _chat_prompt(
        self, asked: ChatRequest, files: list[bytes], sampling: dict[str, Any], constraint: JsonSchema | None
    ) -> Prompt:
        prompt = self.assistant.prompt(conversation(asked, files), **sampling)
        return prompt if constraint is None else dataclasses.replace(prompt, constraint=constraint)

    async def _form(self, wanted: ResponseFormat | None) -> JsonSchema | None:
        """What holds the answer to the form that is asked for; those asked for last are kept."""
        if wanted is None or wanted.type == "text":
            return None
        schema = None if wanted.json_schema is None else wanted.json_schema.schema_
        key = json.dumps(schema, sort_keys=True)
        if key not in self._forms:
            try:
                made = await self._apart(self.assistant.json, schema)
            except InputError as error:
                raise ApiError(
                    400, str(error), param="response_format", code="invalid_json_schema"
                ) from error
            while len(self._forms) >= FORMS:
                self._forms.popitem(last=False)
            self._forms[key] = made
        self._forms.move_to_end(key)
        return self._forms[key]

    def _text_prompt(self, text: str, sampling: dict[str, Any]) -> Prompt:
        import torch

        from pumice.engine.generate import Prompt, check_room
        from pumice.engine.sampling import SamplingParams

        bos = self.assistant.processor.config.bos_token_id
        ids = [] if bos is None else [bos]
        ids += [number for number, _ in self.assistant.processor.tokenizer.pieces(text)]
        if not ids:
            raise InputError("the prompt is empty; give some text to continue")
        prompt = Prompt(
            torch.tensor(ids, dtype=torch.int64),
            params=SamplingParams(**{**self.assistant.generation, **sampling}),
        )
        check_room(self.assistant.model, prompt)
        return prompt

    async def _wrong(self, error: InputError, params: list[str], files: list[bytes], field: str) -> ApiError:
        """The error, with the name of the picture that it is about, if it is about one."""
        damaged = await self._apart(pictures.find_damaged, params, files) if files else None
        return ApiError(400, str(error), param=damaged or field, code="invalid_image" if damaged else None)

    async def _answer(
        self,
        call: Call,
        asked: Generation,
        prompt: Prompt,
        shape: Shape,
        params: list[str],
        files: list[bytes],
    ) -> Response:
        try:
            running = _Running(self, call, prompt)
        except InputError as error:  # prompt and answer do not fit in the engine's cache
            raise ApiError(400, str(error), param=asked.limit[0]) from error
        try:
            first = await running.next()
            if asked.stream:
                return _Events(self._events(running, shape, first), running)
            pieces = [first]
            while pieces[-1].finish is None:
                pieces.append(await running.next())
            running.end()
            return JSONResponse(shape.whole(pieces, running.usage()))
        except BaseException as error:  # cancelled, when the client has gone away
            running.end()
            if isinstance(error, InputError):  # a picture that could not be decoded
                raise await self._wrong(error, params, files, "messages") from error
            raise

    async def _events(self, running: _Running, shape: Shape, piece: Piece) -> AsyncIterator[bytes]:
        try:
            yield shape.opening() + (shape.event(piece) if piece.told else b"")
            while piece.finish is None:
                piece = await running.next()
                if piece.told:
                    yield shape.event(piece)
            yield (shape.usage_event(running.usage()) if shape.usage_wanted else b"") + DONE
        except ApiError as error:
            running.record.refuse(error)
            yield shape.error_event(error.body())
        except Exception as error:  # the status has gone out: the reader is told here, the log all of it
            running.record.error = error
            yield shape.error_event(internal(running.record).body())


class _Events(StreamingResponse):
    """Server-sent events that end their request whatever happens, even before the first of them."""

    def __init__(self, events: AsyncIterator[bytes], running: _Running) -> None:
        self._running = running
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The answer's own alarm does not ring while a reader who takes nothing holds up the sending.
            with anyio.move_on_after(self._running.left + GRACE):
                await super().__call__(scope, receive, send)
        finally:
            self._running.end()


class _Running:
    """One request in the engine: `next` gives its pieces of text as they become certain."""

    def __init__(self, local: Local, call: Call, prompt: Prompt) -> None:
        from pumice.engine.text import TextStream

        self.record, self._local, self._prompt = call.record, local, prompt
        self._decode = local.assistant.processor.tokenizer.decode
        self._text = TextStream(self._decode, prompt.params.stop)
        self._open = True
        self._deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended before the engine
                loop.call_soon_threadsafe(self._deltas.put_nowait, delta)

        self._request = local.engine.submit(prompt, deliver)
        self._alarm = loop.call_later(self.left, self._deltas.put_nowait, None)

    @property
    def left(self) -> float:
        """Seconds of the request's time that remain."""
        return max(0.0, self._local.settings.timeout - self.record.seconds)

    async def next(self) -> Piece:
        """The next piece; the last one has a finish. Raises ApiError, InputError, or what the engine met."""
        delta = await self._deltas.get()
        if delta is None:
            limit = self._local.settings.timeout
            raise ApiError(
                504, f"the answer took longer than {limit:g} s; ask for a shorter one", code="timeout"
            )
        first = not self._text.tokens
        text = self._text.add(delta)
        if self._text.error is not None:
            raise self._text.error
        if self._text.finish == "cancelled":  # not by us: whoever cancels here does not wait for more
            raise ApiError(503, "the server is about to stop; ask again soon", code="draining")
        if first and self._text.tokens:
            seconds = self.record.seconds
            self.record.fields["first_token_seconds"] = round(seconds, 4)
            self._local.metrics.first.observe(seconds)
        scored = tuple(self._scored(one) for one in delta.logprobs or ())
        return Piece(text, scored, self._text.finish)

    def usage(self) -> dict[str, Any]:
        return usage(len(self._prompt.input_ids), self._text.tokens, self._text.cached_tokens)

    def end(self) -> None:
        """Give the engine its place back, and write down what was used. May be called twice."""
        if not self._open:
            return
        self._open = False
        self._alarm.cancel()
        local = self._local
        if self._request.finish is None:
            local.engine.cancel(self._request)
            if self._text.finish is None:
                local.metrics.cancelled.inc()
        told = self.usage()
        cached = told["prompt_tokens_details"]["cached_tokens"]
        self.record.fields |= {
            "prompt_tokens": told["prompt_tokens"],
            "cached_tokens": cached,
            "completion_tokens": told["completion_tokens"],
        }
        local.metrics.prompt.inc(told["prompt_tokens"])
        local.metrics.cached.inc(cached)
        local.metrics.generated.inc(told["completion_tokens"])

    def _scored(self, found: Any) -> Scored:
        top = tuple((self._decode([token]), value) for token, value in found.top)
        return Scored(self._decode([found.token]), found.logprob, top)


def conversation(asked: Dialogue, files: list[bytes]) -> Conversation:
    """The request's messages with its pictures' files in their places.

    System messages at the front become one, "developer" is "system". Text is text: `<image>` in it is no
    placeholder.
    """
    rest = iter(files)
    messages: list[Message] = []
    for given in asked.messages:
        role = "system" if given.role == "developer" else given.role
        if isinstance(given.content, str):
            parts: tuple[str | Shown, ...] = (given.content,)
        else:
            parts = tuple(
                part.text if isinstance(part, TextPart) else Shown(next(rest)) for part in given.content
            )
        if role == "system" and len(messages) == 1 and messages[0].role == "system":
            messages[0] = Message("system", (*messages[0].parts, "\n\n", *parts))
        else:
            messages.append(Message(role, parts))
    return Conversation(tuple(messages))
