"""Answers in OpenAI's form: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

AnswerKind = Literal["chat", "text"]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class ScoredToken:
    """One generated token. logprob: natural logarithm. top: (text, logprob) of the likeliest tokens."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class AnswerPiece:
    """The next part of an answer: text that later tokens cannot change, and its tokens."""

    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    finish: str | None = None  # "stop" or "length"

    @property
    def has_content(self) -> bool:
        """Whether there is something to send. A token that ends inside a character has no text yet."""
        return bool(self.text or self.tokens or self.finish)


@dataclass
class AnswerForm:
    """Writes one answer in the protocol's form.

    logprobs, include_usage: whether the request asks for them. offset: characters of a completion so far.
    """

    kind: AnswerKind
    model: str
    logprobs: bool = False
    include_usage: bool = False
    offset: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    random_id: str = field(default_factory=lambda: secrets.token_hex(12))

    def response(self, pieces: Sequence[AnswerPiece], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the complete answer as one object."""
        text = "".join(piece.text for piece in pieces)
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        finish = pieces[-1].finish
        choice: dict[str, Any] = {"index": 0}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice |= {"logprobs": self._logprobs(tokens), "finish_reason": finish}
        object_name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._common_fields(object_name), "choices": [choice], "usage": usage}

    def first_event(self) -> bytes:
        """Return the event that names the role; empty for a plain completion."""
        return self._event({"role": "assistant", "content": ""}, None, None) if self.kind == "chat" else b""

    def event(self, piece: AnswerPiece) -> bytes:
        """Return a piece as one event, or as two when it ends the answer of a chat."""
        logprobs = self._logprobs(piece.tokens) if piece.tokens or not piece.finish else None
        if self.kind == "text":
            return self._event(piece.text, logprobs, piece.finish)
        if piece.finish is None:
            return self._event({"content": piece.text}, logprobs, None)
        # The last event of a chat holds no text, so text at the end gets an event before it.
        text_event = self._event({"content": piece.text}, logprobs, None) if piece.text or logprobs else b""
        return text_event + self._event({}, None, piece.finish)

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return _sse({**self._common_fields(self._chunk_name), "choices": [], "usage": usage})

    @staticmethod
    def error_event(body: dict[str, Any]) -> bytes:
        return _sse(body)

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _common_fields(self, object_name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.random_id}",
            "object": object_name,
            "created": self.created,
            "model": self.model,
        }

    def _event(self, content: Any, logprobs: Any, finish: str | None) -> bytes:
        key = "delta" if self.kind == "chat" else "text"
        choice = {"index": 0, key: content, "logprobs": logprobs, "finish_reason": finish}
        values: dict[str, Any] = {**self._common_fields(self._chunk_name), "choices": [choice]}
        if self.include_usage:
            values["usage"] = None
        return _sse(values)

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token.text)
        top_logprobs = [dict(token.top) for token in tokens]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top_logprobs if any(top_logprobs) else None,
            "text_offset": offsets,
        }

    @staticmethod
    def _chat_token(token: ScoredToken) -> dict[str, Any]:
        def entry(text: str, logprob: float) -> dict[str, Any]:
            # A token that holds a part of a character decodes to U+FFFD, so its bytes are unknown.
            utf8 = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": utf8}

        return {**entry(token.text, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Return the `usage` object. All counts are tokens; cached ones are a part of the prompt."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _sse(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
