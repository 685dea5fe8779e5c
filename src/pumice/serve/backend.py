"""Answers requests with the engine of this process. Whatever takes long runs in threads of `work`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import ValidationError
from starlette.responses import Response

from pumice.conversation import Conversation, Video
from pumice.engine.grammar_check import check_grammars, refused
from pumice.engine.params import SamplingParams
from pumice.engine.requests import Prompt, check_room
from pumice.errors import ContextOverflow, InputError, shorten
from pumice.serve.answers import AnswerForm, AnswerPiece, ChatForm, CompletionForm, ModelResponse, join
from pumice.serve.anthropic import AnthropicForm, AnthropicRequest
from pumice.serve.boxes import BoxesRequest, boxes_in
from pumice.serve.errors import context_overflow, invalid, unknown_model, validation_error
from pumice.serve.explanation import check_explained, explanation_json
from pumice.serve.fetch import Fetcher
from pumice.serve.grammars import HeldTo, held_to, tool_schemas
from pumice.serve.history import characters_of, conversation, texts_of
from pumice.serve.images import count_tiles, find_damaged, read_images
from pumice.serve.messages import parse
from pumice.serve.metrics import Metrics
from pumice.serve.observe import RequestRecord
from pumice.serve.ollama import (
    OllamaCard,
    OllamaChatRequest,
    OllamaForm,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from pumice.serve.protocol import (
    MAX_ANSWERS,
    BaseRequest,
    ChatRequest,
    CompletionRequest,
    ConversationRequest,
    ExplainRequest,
    ExplanationBody,
    GenerationRequest,
)
from pumice.serve.responses import ResponsesRequest
from pumice.serve.responses_form import ResponsesForm
from pumice.serve.sampling import check_sampling, sampling_of
from pumice.serve.settings import ServerSettings
from pumice.serve.stored import StoredItems
from pumice.serve.stream import ActiveRequest, Echo, EventStream, PieceReader, as_text
from pumice.serve.tools import CLOSE, check_tools, tool_use
from pumice.serve.work import Kind, Workers, kind_of
from pumice.templates import Plain

if TYPE_CHECKING:
    from pumice.assistant import Assistant
    from pumice.engine.constraint import Grammar

T = TypeVar("T", bound=BaseRequest)
# Requests of other protocols, which become one for a chat.
Translated = ResponsesRequest | AnthropicRequest | OllamaChatRequest | OllamaGenerateRequest
Pictures = dict[str, bytes | Video]  # field name -> file, or frames of a video

LONG_BODY = 1 << 15  # bytes; parsing a longer body would block the event loop for too long
MAX_VALUES = 1 << 17  # JSON values in a body, at least; a model with a long context gets more
SCORED_BYTES = 1 << 10  # of each log-probability that is told: of a token, and of each likely one beside it
TOKEN_BYTES = 24  # of each token of a prompt, in each of its answers
MAX_GRAMMARS = 256  # compiled ones in the cache
CLOSE_SECONDS = 1.0  # for the engine's last step; its thread ends with the process


class Backend:
    """Answers requests about the model of an assistant. names: those of the model, the default one first.

    A request comes as its body. Wrong input raises ApiError before the first byte of an answer.
    """

    def __init__(
        self, assistant: Assistant, names: tuple[str, ...], settings: ServerSettings, metrics: Metrics
    ) -> None:
        self.assistant, self.names, self.settings, self.metrics = assistant, names, settings, metrics
        self.ollama_card = OllamaCard(names, assistant.model.config, *assistant.model.sizes())
        self._fetcher: Fetcher | None = None
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()
        self._stored = StoredItems()

    async def start(self) -> None:
        self._workers = Workers()
        if self.settings.allow_image_urls:
            self._fetcher = Fetcher(size=self.settings.body_bytes, seconds=self.settings.image_timeout)
        self.assistant.engine.start()

    async def close(self) -> None:
        self._workers.close()
        closing = threading.Thread(target=self.assistant.engine.close, daemon=True)
        closing.start()
        end = time.monotonic() + CLOSE_SECONDS
        while closing.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if self._fetcher is not None:
            await self._fetcher.close()

    async def chat(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(ChatRequest, body)
        del body
        usage, count = request.include_usage_in_stream, request.n or 1
        form = ChatForm(self._model(request), bool(request.logprobs), usage, count)
        return await self._converse(record, request, form)

    async def respond(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(ResponsesRequest, body)
        request = self._stored.filled(record.key, request, record.memory)
        form = ResponsesForm(self._model(request), request, self._stored, record.key)
        return await self._converse(record, request, form, "input")

    async def message(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(AnthropicRequest, body)
        form = AnthropicForm(self._model(request), request)
        return await self._converse(record, request, form, "messages")

    async def ollama_chat(self, record: RequestRecord, body: bytes) -> Response:
        return await self._ollama(record, await self._parse(OllamaChatRequest, body), "messages")

    async def ollama_generate(self, record: RequestRecord, body: bytes) -> Response:
        return await self._ollama(record, await self._parse(OllamaGenerateRequest, body), "prompt")

    async def _ollama(
        self, record: RequestRecord, request: OllamaChatRequest | OllamaGenerateRequest, field: str
    ) -> Response:
        form = OllamaForm(self._model(request), is_chat=field == "messages")
        if request.loads_only:
            return ModelResponse(form.loaded())
        return await self._converse(record, request, form, field)

    async def ollama_show(self, _: RequestRecord, body: bytes) -> Response:
        await self._parse(OllamaShowRequest, body)
        return ModelResponse(self.ollama_card.show())

    async def _converse(
        self, record: RequestRecord, request: ChatRequest | Translated, form: AnswerForm, field: str = ""
    ) -> Response:
        """Answer a conversation. field: where a request of another protocol has it."""
        # 1. Translate the request to the chat's protocol, and check what needs no work.
        if not isinstance(request, ChatRequest):
            request = await self._workers.run("parse", _as_chat, request, field)
        check_tools(request, field)
        template = self.assistant.processor.template
        tools = tool_use(request, None if isinstance(template, Plain) else template.chat.tools)
        sampling = self._sampling(request)
        if tools and tools.around is not None:
            sampling["stop"] = (*request.stops, CLOSE)
        if request.logprobs:
            sampling["logprobs"] = request.top_logprobs or 0
        # 2. Compile what the answer is held to, and read the pictures.
        schemas = await self._workers.run("parse", tool_schemas, request, tools)
        held = await self._workers.run("parse", held_to, request, tools)
        check_sampling(sampling, self.assistant.generation, is_held=held is not None)
        constraint = await self._compile(held, schemas)
        pictures, pixels = await self._read_images(record, request)
        told = await self._workers.run("parse", tools.told)
        kind = kind_of(characters_of(request) + len(told), pixels)
        readers: list[PieceReader] = [tools.reader() if tools else as_text for _ in range(request.n or 1)]
        # 3. Answer.
        async with self._input_errors(field or "messages", pictures, kind=kind):
            prompt = await self._workers.run(kind, self._chat_prompt, request, pictures, told, sampling)
            pictures.clear()
            prompts = _several(replace(prompt, constraint=constraint), request.n or 1)
            return await self._answer(record, request, prompts, readers, form)

    async def complete(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(CompletionRequest, body)
        count = request.n or 1
        if len(request.prompts) * count > MAX_ANSWERS:
            message = f"{len(request.prompts) * count} answers are asked for, at most {MAX_ANSWERS} are given"
            raise invalid("n", f"{message}; ask for fewer at once", "too_many_answers")
        sampling = self._sampling(request)
        if request.logprobs is not None:
            sampling["logprobs"] = request.logprobs
            sampling["prompt_logprobs"] = request.logprobs if request.echo else None
        held = await self._workers.run("parse", held_to, request)
        check_sampling(sampling, self.assistant.generation, is_held=held is not None)
        constraint = await self._compile(held)
        scored, usage = request.logprobs is not None, request.include_usage_in_stream
        form = CompletionForm(self._model(request), scored, usage, request.max_tokens == 0)
        prompts: list[Prompt] = []
        readers: list[PieceReader] = []
        async with self._input_errors("prompt"):
            for text in request.prompts:
                kind, special = kind_of(len(text)), request.add_special_tokens
                prompt = await self._workers.run(kind, self._text_prompt, text, special, sampling)
                prompts += _several(replace(prompt, constraint=constraint), count)
                if not request.echo:
                    readers += [as_text] * count
                    continue
                if not isinstance(text, str):
                    decode = self.assistant.processor.tokenizer.decode
                    text = await self._workers.run("long", decode, text)
                readers += [Echo(text, len(prompt.input_ids), form.only_prompts) for _ in range(count)]
            return await self._answer(record, request, prompts, readers, form)

    async def boxes(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(BoxesRequest, body)
        return ModelResponse(await self._workers.run("parse", boxes_in, self.assistant.model.config, request))

    async def explain(self, record: RequestRecord, body: bytes) -> Response:
        request = await self._parse(ExplainRequest, body)
        pictures, pixels = await self._read_images(record, request)
        if pixels > self.settings.max_pixels:
            raise invalid(
                "messages",
                f"the pictures have {pixels / 1e6:.1f} megapixels together, an explanation may show "
                f"{self.settings.max_pixels / 1e6:g}; send smaller copies",
                "image_too_large",
            )
        async with self._input_errors("messages", pictures, kind=kind_of(0, pixels)):
            # Not in the thread of explanations: there is only one.
            texts = texts_of(request.messages[-1])
            await self._workers.run(kind_of(characters_of(request)), check_explained, self.assistant, texts)
            return await self._workers.run("explain", self._explanation, request, pictures)

    def _explanation(self, request: ExplainRequest, pictures: Pictures) -> Response:
        *context, answer = conversation(request, pictures, self.assistant.processor.template).messages
        if answer.role != "assistant":
            raise InputError("the last message must be the assistant's, the answer to explain")
        values = explanation_json(self.assistant, Conversation(tuple(context)), answer.text)
        return ModelResponse(ExplanationBody(**values))

    async def _read_images(self, record: RequestRecord, request: ConversationRequest) -> tuple[Pictures, int]:
        """Return the pictures and videos of a conversation, in order, and their pixels together."""
        config = self.assistant.model.config
        files = await read_images(
            request.images, self.settings, self._fetcher, self._workers, record.memory, config.video
        )
        record.fields["pictures"] = len(files)
        self.metrics.images.inc(len(files))
        # What the tower will see of them stays in memory until it is computed.
        record.memory.take(count_tiles(files, config) * 3 * config.vision.image_size**2 * 4)
        pictures = {param: file.data for (param, _), file in zip(request.images, files, strict=True)}
        return pictures, sum(width * height for file in files for width, height in file.sizes)

    async def _parse(self, kind: type[T], body: bytes) -> T:
        """Return the body as a request of this kind. Raises ApiError that names the wrong field."""
        try:
            request = (
                parse(kind, body)
                if len(body) < LONG_BODY
                else await self._workers.run("parse", self._parse_long, kind, body)
            )
        except ValidationError as error:
            raise validation_error(error, kind.model_fields) from None
        except InputError as error:
            raise invalid(None, str(error), "json_invalid") from None
        if request.model is not None and self._model(request) not in self.names:
            raise unknown_model(request.model, self.names)
        return request

    def _parse_long(self, kind: type[T], body: bytes) -> T:
        """Parse a body. Raises ApiError if it would take much more memory as Python's values."""
        limit = max(MAX_VALUES, 4 * self.assistant.model.config.decoder.context)
        values = len(body) - len(body.translate(None, b",:[{"))
        if values > limit:
            message = f"the body has about {values} values, at most {limit} are taken; send less at once"
            raise invalid(None, message, "too_many_values")
        return parse(kind, body)

    def _model(self, request: BaseRequest) -> str:
        """Return the model's name. Ollama's clients may add the tag of the newest version."""
        name = request.model or self.names[0]
        return name if name in self.names else name.removesuffix(":latest")

    def _sampling(self, request: GenerationRequest) -> dict[str, Any]:
        """Return the fields of SamplingParams that the request sets."""
        longest = self.settings.max_tokens or self.assistant.model.config.decoder.context
        return sampling_of(request, self.assistant.generation, self.settings.default_tokens, longest)

    def _chat_prompt(
        self, request: ChatRequest, pictures: Pictures, told: str, sampling: dict[str, Any]
    ) -> Prompt:
        messages = conversation(request, pictures, self.assistant.processor.template, told)
        if request.messages[-1].role == "assistant" and not request.continues:
            raise InputError(
                "the last message is the assistant's; add a question, or set continue_final_message to have "
                "the answer continued"
            )
        return self.assistant.prompt(messages, continued=request.continues, **sampling)

    async def _compile(self, held: HeldTo | None, schemas: Sequence[HeldTo] = ()) -> Grammar | None:
        """Return the constraint of answers that are held to something. The last ones used stay in a cache.

        schemas: what has to be right beside it, so that an error names its field.
        """
        wanted = [*schemas, *([] if held is None else [held])]
        # Of equal ones, the first has the field that an error names.
        first = {one.grammar: one for one in reversed(wanted)}
        new = [one for one in wanted if one is first[one.grammar] and one.grammar not in self._grammars]
        if new:
            # 1. A process compiles them first. It ends when nobody waits for it any more.
            grammars = [one.grammar for one in new]
            reasons = await self._workers.run("schemas", check_grammars, grammars)
            # 2. What it could compile, this process can.
            for one, reason in zip(new, reasons, strict=True):
                async with self._input_errors(one.field, code=one.code):
                    if reason:
                        raise refused(reason, one.what)
                    self._grammars[one.grammar] = await self._workers.run("schemas", self._grammar, one)
        constraint = None if held is None else self._grammars[held.grammar]
        for one in wanted:
            self._grammars.move_to_end(one.grammar)
        while len(self._grammars) > MAX_GRAMMARS:
            self._grammars.popitem(last=False)
        return constraint

    def _grammar(self, held: HeldTo) -> Grammar:
        from pumice.engine.constraint import Grammar

        config = self.assistant.model.config
        tokenizer, stops = self.assistant.processor.tokenizer, config.stop_token_ids
        return Grammar(tokenizer, held.grammar, config.decoder.vocab_size, stops, held.what, checked=True)

    def _text_prompt(self, text: str | list[int], special: bool | None, sampling: dict[str, Any]) -> Prompt:
        """Return the prompt of a text, which begins with BOS unless `special` is False, or of token ids."""
        bos = self.assistant.processor.config.bos_token_id
        if isinstance(text, str):
            context = self.assistant.model.config.decoder.context
            self.assistant.processor.tokenizer.check_length([text], context, "the prompt")
            ids = [] if bos is None or special is False else [bos]
            ids += [token_id for token_id, _ in self.assistant.processor.tokenizer.pieces(text)]
        else:
            ids = text
        if not ids:
            raise InputError("the prompt is empty; give some text to continue")
        size = self.assistant.model.config.decoder.vocab_size
        if (largest := max(ids)) >= size:
            number = shorten(largest, 40)
            raise InputError(f"the prompt has the token {number}, the model only {size}; give others")
        params = SamplingParams(**SamplingParams.options(self.assistant.generation, sampling))
        decode = self.assistant.processor.tokenizer.decode
        prompt = Prompt(torch.tensor(ids, dtype=torch.int64), params=params, decode=decode)
        check_room(self.assistant.model, prompt)
        return prompt

    @contextlib.asynccontextmanager
    async def _input_errors(
        self, param: str, pictures: Pictures | None = None, code: str | None = None, kind: Kind = "long"
    ) -> AsyncIterator[None]:
        """Turn an InputError into an ApiError about `param`, or about the picture that is damaged."""
        try:
            yield
        except ContextOverflow as error:
            raise context_overflow(error, param) from error
        except InputError as error:
            damaged = await self._workers.run(kind, find_damaged, pictures) if pictures else None
            if damaged is not None:
                param, code = damaged, "invalid_image"
            raise invalid(param, str(error), code) from error

    async def _answer(
        self,
        record: RequestRecord,
        request: GenerationRequest,
        prompts: Sequence[Prompt],
        readers: Sequence[PieceReader],
        form: AnswerForm,
    ) -> Response:
        # 1. Give the prompts to the engine. An answer that would not fit is cut to what fits.
        engine = self.assistant.engine
        cells = min(engine.model.config.decoder.context, engine.stats().cache_capacity + 1)
        prompts = [_cut(prompt, cells) for prompt in prompts]
        tokenizer = self.assistant.processor.tokenizer
        record.memory.take(sum(map(_bytes_of, prompts)))
        running = ActiveRequest(
            engine, tokenizer, prompts, readers, record, self.metrics, self.settings.timeout
        )
        try:
            # 2. Wait for the first piece. Until then an error can still change the status of the response.
            pieces = running.pieces(bool(request.return_progress))
            first = await anext(pieces)
            if request.stream:
                return EventStream(running, form, first, pieces)
            # 3. Without a stream, collect all pieces and send one object.
            others = [piece async for piece in pieces]
            answers: list[list[AnswerPiece]] = [[] for _ in prompts]
            for piece in (first, *others):
                if isinstance(piece, AnswerPiece):
                    answers[piece.index].append(piece)
            running.end()
            return ModelResponse(form.response([join(answer) for answer in answers], running.usage()))
        except BaseException:  # also a cancellation, after the client disconnects
            running.end()
            raise


def _as_chat(request: Translated, field: str) -> ChatRequest:
    """Return a request of another protocol as one for a chat. field: where it has the conversation."""
    try:
        return request.chat()
    except ValidationError as error:  # one turn may become several messages: together too many
        raise invalid(field, validation_error(error).message) from None


def _several(prompt: Prompt, count: int) -> list[Prompt]:
    """Return the prompts of several answers. The engine computes them once, and each has its own seed."""
    seed = prompt.params.seed
    return [
        replace(prompt, params=replace(prompt.params, seed=None if seed is None else (seed + number) % 2**63))
        for number in range(count)
    ]


def _cut(prompt: Prompt, cells: int) -> Prompt:
    """Return the prompt with an answer that fits in so many cells."""
    longest = min(max(1, cells - len(prompt.input_ids)), prompt.params.max_new_tokens)
    return replace(prompt, params=replace(prompt.params, max_new_tokens=longest))


def _bytes_of(prompt: Prompt) -> int:
    """Return the bytes that a prompt's tokens take, and the log-probabilities of all that is scored."""
    params, tokens = prompt.params, len(prompt.input_ids)
    scores = 0 if params.logprobs is None else params.max_new_tokens * (1 + params.logprobs)
    scores += 0 if params.prompt_logprobs is None else tokens * (1 + params.prompt_logprobs)
    return tokens * TOKEN_BYTES + scores * SCORED_BYTES
