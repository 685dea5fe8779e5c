"""Answers in the forms of OpenAI's chat and completions, built from the models of `protocol`."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from starlette.responses import Response

from pumice import __version__
from pumice.serve.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChoiceLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ErrorBody,
    Finish,
    LogprobEntry,
    PromptProgress,
    ToolCall,
    ToolCallDelta,
    ToolFunction,
    Usage,
)

DONE = b"data: [DONE]\n\n"
EVENTS = "text/event-stream"
FINGERPRINT = f"pumice-{__version__}"


class ModelResponse(Response):
    """A model of `protocol` as a JSON response. Fields that were not set do not appear."""

    media_type = "application/json"

    def render(self, content: BaseModel) -> bytes:
        return content.model_dump_json(exclude_unset=True).encode()


def event(content: BaseModel) -> bytes:
    """Return a model of `protocol` as a server-sent event."""
    return b"data: " + content.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def named_event(kind: str, content: BaseModel) -> bytes:
    """Return a model as a server-sent event that has a name."""
    return f"event: {kind}\n".encode() + event(content)


class AnswerModel(BaseModel):
    """A part of an answer whose constants, such as its type, are written although nobody sets them."""

    def model_post_init(self, _: Any) -> None:
        fields = type(self).model_fields.items()
        self.model_fields_set.update(
            name
            for name, field in fields
            if field.default_factory or field.default not in (None, PydanticUndefined)
        )


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer, or all of it: text that later tokens cannot change, and its tokens.

    index: which of the request's answers. call_id, name: of a function that is called; name only in the first
    piece of the call. arguments: a part of their JSON. first: of a text that begins with the prompt, whose
    tokens are scored, the first one, which nothing predicts. stop: the stop text that ended the answer.
    """

    index: int = 0
    text: str = ""
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    first: str | None = None
    tokens: tuple[LogprobEntry, ...] = ()
    finish: Finish | None = None
    stop: str | None = None

    @property
    def has_content(self) -> bool:
        """Whether there is something to send. A token that ends inside a character has no text yet."""
        return bool(self.text or self.name or self.arguments or self.tokens or self.finish)


def join(pieces: Sequence[AnswerPiece]) -> AnswerPiece:
    """Return the complete answer, whose pieces these are."""
    return AnswerPiece(
        pieces[-1].index,
        "".join(piece.text for piece in pieces),
        pieces[-1].call_id,
        "".join(piece.name for piece in pieces),
        "".join(piece.arguments for piece in pieces),
        pieces[0].first,
        tuple(token for piece in pieces for token in piece.tokens),
        pieces[-1].finish,
        pieces[-1].stop,
    )


class AnswerForm(ABC):
    """Writes the answers to one request in the form of a protocol, whole or as a stream of pieces."""

    media_type = EVENTS  # of a stream

    @abstractmethod
    def response(self, answers: Sequence[AnswerPiece], usage: Usage) -> BaseModel:
        """Return the complete answers as one object."""

    @abstractmethod
    def piece(self, piece: AnswerPiece) -> bytes:
        """Return a piece as it is streamed."""

    @abstractmethod
    def end(self, usage: Usage) -> bytes:
        """Return what a stream ends with."""

    def begin(self, usage: Usage) -> bytes:
        """Return what a stream begins with. usage: so far, the prompt's tokens."""
        return b""

    def progress(self, progress: PromptProgress) -> bytes:
        """Return how far the prompt is read, where the protocol can say it."""
        return b""

    def error(self, error: ErrorBody) -> bytes:
        """Return an error that ends a stream."""
        return event(error)


@dataclass
class OpenAiForm(AnswerForm):
    """Writes answers as OpenAI does. logprobs, include_usage: whether the request asks for them."""

    model: str
    logprobs: bool
    include_usage: bool
    PREFIX: ClassVar[str]  # of an answer's id

    def __post_init__(self) -> None:
        answer_id = f"{self.PREFIX}-{secrets.token_hex(12)}"
        self._head: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": self.model}
        self._head["system_fingerprint"] = FINGERPRINT
        self._no_usage: dict[str, Any] = {"usage": None} if self.include_usage else {}


@dataclass
class ChatForm(OpenAiForm):
    """Writes answers to a conversation. count: of the answers."""

    count: int = 1
    PREFIX = "chatcmpl"

    def response(self, answers: Sequence[AnswerPiece], usage: Usage) -> BaseModel:
        choices = [self._choice(answer) for answer in answers]
        return ChatCompletion(object="chat.completion", **self._head, choices=choices, usage=usage)

    def begin(self, _: Usage) -> bytes:
        """Return the events that name the role."""
        deltas = [ChatDelta(role="assistant", content="") for _ in range(self.count)]
        return b"".join(self._event(index, delta) for index, delta in enumerate(deltas))

    def piece(self, piece: AnswerPiece) -> bytes:
        """Return a piece as one event, or as two when it ends the answer: the last one holds no text."""
        events, index = b"", piece.index
        called = piece.name or piece.arguments
        logprobs = self._logprobs(piece.tokens)
        if piece.text or not (called or (piece.finish and not piece.tokens)):
            events = self._event(index, ChatDelta(content=piece.text), logprobs)
            logprobs = self._logprobs(())
        if called:
            function = ToolFunction(arguments=piece.arguments)
            call = ToolCallDelta(index=0, function=function)
            if piece.name:
                function = ToolFunction(name=piece.name, arguments=piece.arguments)
                call = ToolCallDelta(index=0, id=piece.call_id, type="function", function=function)
            events += self._event(index, ChatDelta(tool_calls=[call]), logprobs)
        return (
            events if piece.finish is None else events + self._event(index, ChatDelta(), None, piece.finish)
        )

    def end(self, usage: Usage) -> bytes:
        return (self._chunk([], usage=usage) if self.include_usage else b"") + DONE

    def _choice(self, answer: AnswerPiece) -> ChatChoice:
        assert answer.finish is not None
        message = AnswerMessage(role="assistant", content=answer.text, refusal=None)
        if answer.name:
            function = ToolFunction(name=answer.name, arguments=answer.arguments)
            message.content = answer.text or None
            message.tool_calls = [ToolCall(id=answer.call_id, type="function", function=function)]
        return ChatChoice(
            index=answer.index,
            message=message,
            logprobs=self._logprobs(answer.tokens),
            finish_reason=answer.finish,
        )

    def progress(self, progress: PromptProgress) -> bytes:
        return self._chunk([], prompt_progress=progress)

    def _event(
        self,
        index: int,
        delta: ChatDelta,
        logprobs: ChoiceLogprobs | None = None,
        finish: Finish | None = None,
    ) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return self._chunk([choice], **self._no_usage)

    def _chunk(self, choices: list[ChatChunkChoice], **more: Any) -> bytes:
        return event(ChatChunk(object="chat.completion.chunk", **self._head, choices=choices, **more))

    def _logprobs(self, tokens: Sequence[LogprobEntry]) -> ChoiceLogprobs | None:
        return ChoiceLogprobs(content=list(tokens), refusal=None) if self.logprobs else None


@dataclass
class CompletionForm(OpenAiForm):
    """Writes continuations of texts. only_prompts: nothing continues them."""

    only_prompts: bool = False
    PREFIX = "cmpl"
    _offsets: dict[int, int] = field(default_factory=dict)  # index -> characters so far

    def response(self, answers: Sequence[AnswerPiece], usage: Usage) -> BaseModel:
        choices = [self._choice(answer, self._logprobs(answer)) for answer in answers]
        return self._completion(choices, usage=self._usage(usage))

    def piece(self, piece: AnswerPiece) -> bytes:
        logprobs = self._logprobs(piece) if piece.tokens or piece.finish is None else None
        return event(self._completion([self._choice(piece, logprobs)], **self._no_usage))

    def end(self, usage: Usage) -> bytes:
        return (event(self._completion([], usage=self._usage(usage))) if self.include_usage else b"") + DONE

    def progress(self, progress: PromptProgress) -> bytes:
        return event(self._completion([], prompt_progress=progress))

    def _usage(self, usage: Usage) -> Usage:
        if not self.only_prompts:  # else the token that the engine computes is left out
            return usage
        return usage.model_copy(update={"completion_tokens": 0, "total_tokens": usage.prompt_tokens})

    def _completion(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        return Completion(object="text_completion", **self._head, choices=choices, **more)

    @staticmethod
    def _choice(piece: AnswerPiece, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        return CompletionChoice(
            index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish
        )

    def _logprobs(self, piece: AnswerPiece) -> CompletionLogprobs | None:
        if not self.logprobs:
            return None
        scored = piece.tokens
        first = [] if piece.first is None else [piece.first]
        tokens = [*first, *(token.token for token in scored)]
        start = self._offsets.get(piece.index, 0)
        *offsets, self._offsets[piece.index] = accumulate(map(len, tokens), initial=start)
        top = [{other.token: other.logprob for other in token.top_logprobs} for token in scored]
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[*(None for _ in first), *(token.logprob for token in scored)],
            top_logprobs=[*(None for _ in first), *top] if any(top) else None,
            text_offset=offsets,
        )
