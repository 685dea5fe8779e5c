"""Answers requests with the engine of this process.

A pool of threads decodes pictures and long texts, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import torch
from pydantic import ValidationError
from starlette.responses import Response

from pumice.conversation import Conversation, ImagePart, Message
from pumice.engine.requests import Prompt, check_room
from pumice.engine.sampling import SamplingParams
from pumice.errors import ContextOverflow, InputError
from pumice.messages import join_messages
from pumice.serve.answers import ChatForm, CompletionForm, ModelResponse, join
from pumice.serve.errors import ApiError, context_overflow, not_json, unknown_model, validation_error
from pumice.serve.explanation import explanation_json
from pumice.serve.fetch import Fetcher
from pumice.serve.images import find_damaged, read_images
from pumice.serve.metrics import Metrics
from pumice.serve.observe import RequestRecord
from pumice.serve.protocol import (
    BaseRequest,
    ChatRequest,
    CompletionRequest,
    ConversationRequest,
    ExplainRequest,
    ExplanationBody,
    GenerationRequest,
    PastAnswer,
    ResponseFormat,
    TextPart,
    parse,
)
from pumice.serve.settings import ServerSettings
from pumice.serve.stream import ActiveRequest, EventStream

if TYPE_CHECKING:
    from pumice.assistant import Assistant
    from pumice.engine.constraint import JsonSchema

T = TypeVar("T", bound=BaseRequest)
Pictures = dict[str, bytes]  # field name -> file

LONG_BODY = 1 << 15  # bytes; parsing a longer body would block the event loop for too long
MAX_SCHEMAS = 32  # compiled JSON schemas in the cache
PROMPT_THREADS = 2  # threads that prepare prompts; each may hold a decoded picture


class Backend:
    """Answers requests about the model of an assistant. names: those of the model, the default one first.

    A request comes as its body. Wrong input raises ApiError before the first byte of an answer.
    """

    def __init__(
        self, assistant: Assistant, names: tuple[str, ...], settings: ServerSettings, metrics: Metrics
    ) -> None:
        self.assistant, self.names, self.settings, self.metrics = assistant, names, settings, metrics
        self._fetcher: Fetcher | None = None
        self._schemas: OrderedDict[str, JsonSchema] = OrderedDict()

    async def start(self) -> None:
        self._pool = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="pumice-prompts")
        self._explain_pool = ThreadPoolExecutor(1, thread_name_prefix="pumice-explain")
        if self.settings.allow_image_urls:
            self._fetcher = Fetcher(size=self.settings.body_bytes, seconds=self.settings.image_timeout)
        self.assistant.engine.start()

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.assistant.engine.close)
        for pool in (self._pool, self._explain_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher is not None:
            await self._fetcher.close()

    async def chat(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(ChatRequest, body)
        sampling = self._sampling(request)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        if request.logprobs:
            sampling["logprobs"] = request.top_logprobs or 0
        constraint = await self._compile_schema(request.response_format)
        pictures = await self._read_images(record, request)
        form = ChatForm(self._model(request), bool(request.logprobs), request.include_usage_in_stream)
        async with self._input_errors("messages", pictures):
            prompt = await self._run_in_pool(self._chat_prompt, request, pictures, sampling, constraint)
            return await self._answer(record, request, prompt, form)

    async def complete(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(CompletionRequest, body)
        sampling = self._sampling(request)
        if request.logprobs is not None:
            sampling["logprobs"] = request.logprobs
        logprobs = request.logprobs is not None
        form = CompletionForm(self._model(request), logprobs, request.include_usage_in_stream)
        async with self._input_errors("prompt"):
            prompt = await self._run_in_pool(self._text_prompt, request.text, sampling)
            return await self._answer(record, request, prompt, form)

    async def explain(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(ExplainRequest, body)
        pictures = await self._read_images(record, request)
        limit, loop = self.settings.timeout, asyncio.get_running_loop()
        try:
            async with self._input_errors("messages", pictures):
                with anyio.fail_after(max(0.0, limit - record.seconds)):
                    return await loop.run_in_executor(
                        self._explain_pool, self._explanation, request, pictures
                    )
        except TimeoutError:
            message = f"the explanation took longer than {limit:g} s; ask about a shorter one"
            raise ApiError(504, message, code="timeout") from None

    def _explanation(self, request: ExplainRequest, pictures: Pictures) -> Response:
        *context, answer = conversation(request, pictures).messages
        if answer.role != "assistant":
            raise InputError("the last message must be the assistant's, the answer to explain")
        values = explanation_json(self.assistant, Conversation(tuple(context)), answer.text)
        return ModelResponse(ExplanationBody(**values))

    async def _read_images(self, record: RequestRecord, request: ConversationRequest) -> Pictures:
        """Return the pictures of a conversation, in order."""
        files = await read_images(request.images, self.settings, self._fetcher, self._pool)
        record.fields["pictures"] = len(files)
        self.metrics.images.inc(len(files))
        return {param: data for (param, _), data in zip(request.images, files, strict=True)}

    async def _run_in_pool(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, functools.partial(work, *arguments)
        )

    async def _parse(self, kind: type[T], body: bytes) -> T:
        """Return the body as a request of this kind. Raises ApiError that names the wrong field."""
        try:
            request = (
                parse(kind, body) if len(body) < LONG_BODY else await self._run_in_pool(parse, kind, body)
            )
        except ValidationError as error:
            raise validation_error(error) from None
        except ValueError as error:
            raise not_json(error) from None
        if request.model is not None and request.model not in self.names:
            raise unknown_model(request.model, self.names)
        return request

    def _model(self, request: BaseRequest) -> str:
        return request.model or self.names[0]

    def _sampling(self, request: GenerationRequest) -> dict[str, Any]:
        """Return the fields of SamplingParams that the request sets."""
        most = self.settings.max_tokens or self.assistant.model.config.decoder.context
        asked = self.settings.default_tokens if request.limit is None else request.limit
        values = {
            "max_new_tokens": most if asked == -1 else min(asked, most),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": None if request.top_k is None else max(0, request.top_k),
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "seed": None if request.seed is None else request.seed % 2**63,
            "stop": request.stops,
        }
        return {key: value for key, value in values.items() if value is not None}

    def _chat_prompt(
        self,
        request: ChatRequest,
        pictures: Pictures,
        sampling: dict[str, Any],
        constraint: JsonSchema | None,
    ) -> Prompt:
        continued = bool(request.continue_final_message)
        prompt = self.assistant.prompt(conversation(request, pictures), continued=continued, **sampling)
        return prompt if constraint is None else replace(prompt, constraint=constraint)

    async def _compile_schema(self, response_format: ResponseFormat | None) -> JsonSchema | None:
        """Return the constraint that a response_format asks for. The last ones used stay in a cache."""
        if response_format is None or response_format.type == "text":
            return None
        schema = None if response_format.json_schema is None else response_format.json_schema.schema_
        key = json.dumps(schema, sort_keys=True)
        if key not in self._schemas:
            async with self._input_errors("response_format", code="invalid_json_schema"):
                constraint = await self._run_in_pool(self.assistant.json, schema)
            while len(self._schemas) >= MAX_SCHEMAS:
                self._schemas.popitem(last=False)
            self._schemas[key] = constraint
        self._schemas.move_to_end(key)
        return self._schemas[key]

    def _text_prompt(self, text: str, sampling: dict[str, Any]) -> Prompt:
        bos = self.assistant.processor.config.bos_token_id
        ids = [] if bos is None else [bos]
        ids += [token_id for token_id, _ in self.assistant.processor.tokenizer.pieces(text)]
        if not ids:
            raise InputError("the prompt is empty; give some text to continue")
        params = SamplingParams(**{**self.assistant.generation, **sampling})
        prompt = Prompt(torch.tensor(ids, dtype=torch.int64), params=params)
        check_room(self.assistant.model, prompt)
        return prompt

    @contextlib.asynccontextmanager
    async def _input_errors(
        self, param: str, pictures: Pictures | None = None, code: str | None = None
    ) -> AsyncIterator[None]:
        """Turn an InputError into an ApiError about `param`, or about the picture that is damaged."""
        try:
            yield
        except ContextOverflow as error:
            raise context_overflow(error, param) from error
        except InputError as error:
            damaged = await self._run_in_pool(find_damaged, pictures) if pictures else None
            if damaged is not None:
                param, code = damaged, "invalid_image"
            raise ApiError(400, str(error), param=param, code=code) from error

    async def _answer(
        self,
        record: RequestRecord,
        request: GenerationRequest,
        prompt: Prompt,
        form: ChatForm | CompletionForm,
    ) -> Response:
        # 1. Give the prompt to the engine. An answer that would not fit is cut to what fits.
        engine = self.assistant.engine
        cells = min(engine.model.config.decoder.context, engine.stats().cache_capacity + 1)
        room = max(1, cells - len(prompt.input_ids))
        params = replace(prompt.params, max_new_tokens=min(room, prompt.params.max_new_tokens))
        prompt = replace(prompt, params=params)
        tokenizer = self.assistant.processor.tokenizer
        running = ActiveRequest(engine, tokenizer, prompt, record, self.metrics, self.settings.timeout)
        try:
            # 2. Wait for the first piece. Until then an error can still change the status of the response.
            pieces = [await running.next()]
            if request.stream:
                return EventStream(running, form, pieces[0])
            # 3. Without a stream, collect all pieces and send one object.
            while pieces[-1].finish is None:
                pieces.append(await running.next())
            running.end()
            return ModelResponse(form.response(join(pieces), running.usage()))
        except BaseException:  # also a cancellation, after the client disconnects
            running.end()
            raise


def conversation(request: ConversationRequest, pictures: Pictures) -> Conversation:
    """Return the messages of a request as a Conversation. pictures: in order.

    `join_messages` says what becomes of other roles and orders. `<image>` in a text is plain text, not a
    placeholder.
    """
    remaining_files = iter(pictures.values())
    messages: list[Message] = []
    for message in request.messages:
        content: Any = message.content
        if isinstance(message, PastAnswer) and not content:
            content = message.refusal or ""
        parts: tuple[str | ImagePart, ...] = (
            (content,)
            if isinstance(content, str)
            else tuple(
                part.text if isinstance(part, TextPart) else ImagePart(next(remaining_files))
                for part in content
            )
        )
        messages.append(Message(message.role, parts))
    return Conversation(join_messages(messages))
