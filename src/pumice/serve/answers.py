"""Answers in OpenAI's form, whole or as server-sent events, built from the models of `protocol`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

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
    Finish,
    LogprobEntry,
    PromptProgress,
    Usage,
)

DONE = b"data: [DONE]\n\n"


class ModelResponse(Response):
    """A model of `protocol` as a JSON response. Fields that were not set do not appear."""

    media_type = "application/json"

    def render(self, content: BaseModel) -> bytes:
        return content.model_dump_json(exclude_unset=True).encode()


def event(content: BaseModel) -> bytes:
    """Return a model of `protocol` as a server-sent event."""
    return b"data: " + content.model_dump_json(exclude_unset=True).encode() + b"\n\n"


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer, or all of it: text that later tokens cannot change, and its tokens."""

    text: str = ""
    tokens: tuple[LogprobEntry, ...] = ()
    finish: Finish | None = None

    @property
    def has_content(self) -> bool:
        """Whether there is something to send. A token that ends inside a character has no text yet."""
        return bool(self.text or self.tokens or self.finish)


def join(pieces: Sequence[AnswerPiece]) -> AnswerPiece:
    """Return the complete answer, whose pieces these are."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return AnswerPiece("".join(piece.text for piece in pieces), tokens, pieces[-1].finish)


@dataclass
class ChatForm:
    """Writes the answer to a conversation. logprobs, include_usage: whether the request asks for them."""

    model: str
    logprobs: bool
    include_usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, answer: AnswerPiece, usage: Usage) -> BaseModel:
        """Return the complete answer as one object."""
        assert answer.finish is not None
        message = AnswerMessage(role="assistant", content=answer.text, refusal=None)
        choice = ChatChoice(
            index=0,
            message=message,
            logprobs=self._logprobs(answer.tokens),
            finish_reason=answer.finish,
        )
        return ChatCompletion(**self._head("chat.completion"), choices=[choice], usage=usage)

    def first_event(self) -> bytes:
        """Return the event that names the role."""
        return self._event(ChatDelta(role="assistant", content=""))

    def event(self, piece: AnswerPiece) -> bytes:
        """Return a piece as one event, or as two when it ends the answer: the last one holds no text."""
        events = b""
        if piece.text or piece.tokens or piece.finish is None:
            events = self._event(ChatDelta(content=piece.text), self._logprobs(piece.tokens))
        return events if piece.finish is None else events + self._event(ChatDelta(), finish=piece.finish)

    def usage_event(self, usage: Usage) -> bytes:
        return event(ChatChunk(**self._head("chat.completion.chunk"), choices=[], usage=usage))

    def progress_event(self, progress: PromptProgress) -> bytes:
        return event(ChatChunk(**self._head("chat.completion.chunk"), choices=[], prompt_progress=progress))

    def _event(
        self, delta: ChatDelta, logprobs: ChoiceLogprobs | None = None, finish: Finish | None = None
    ) -> bytes:
        choice = ChatChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=finish)
        usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        return event(ChatChunk(**self._head("chat.completion.chunk"), choices=[choice], **usage))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[LogprobEntry]) -> ChoiceLogprobs | None:
        return ChoiceLogprobs(content=list(tokens), refusal=None) if self.logprobs else None


@dataclass
class CompletionForm:
    """Writes the continuation of a text. offset: its characters so far. All else is as in `ChatForm`."""

    model: str
    logprobs: bool
    include_usage: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    offset: int = 0

    def response(self, answer: AnswerPiece, usage: Usage) -> BaseModel:
        return self._completion([self._choice(answer, self._logprobs(answer.tokens))], usage=usage)

    def first_event(self) -> bytes:
        return b""

    def event(self, piece: AnswerPiece) -> bytes:
        logprobs = self._logprobs(piece.tokens) if piece.tokens or piece.finish is None else None
        usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        return event(self._completion([self._choice(piece, logprobs)], **usage))

    def usage_event(self, usage: Usage) -> bytes:
        return event(self._completion([], usage=usage))

    def progress_event(self, progress: PromptProgress) -> bytes:
        return event(self._completion([], prompt_progress=progress))

    def _completion(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        head: dict[str, Any] = {"id": self.id, "created": self.created, "model": self.model, **more}
        return Completion(object="text_completion", choices=choices, **head)

    @staticmethod
    def _choice(piece: AnswerPiece, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        return CompletionChoice(index=0, text=piece.text, logprobs=logprobs, finish_reason=piece.finish)

    def _logprobs(self, tokens: Sequence[LogprobEntry]) -> CompletionLogprobs | None:
        if not self.logprobs:
            return None
        *offsets, self.offset = accumulate((len(token.token) for token in tokens), initial=self.offset)
        top = [{other.token: other.logprob for other in token.top_logprobs} for token in tokens]
        return CompletionLogprobs(
            tokens=[token.token for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=top if any(top) else None,
            text_offset=offsets,
        )
