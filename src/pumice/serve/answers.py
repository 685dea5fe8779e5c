"""Answers in OpenAI's shape, whole or as server-sent events.

Knows names and nesting of the protocol, ids and times. Does not know where text comes from.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["chat", "text"]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Scored:
    """A token's text, how likely it was (natural logarithm), and the likeliest ones."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What has become certain of an answer."""

    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: str | None = None  # "stop" or "length"

    @property
    def told(self) -> bool:
        """Whether there is anything to say: a part of a character is no text yet."""
        return bool(self.text or self.scored or self.finish)


@dataclass
class Shape:
    """The frame of one answer: its id, its model, its kind. `logprobs`: whether they were asked for."""

    kind: Kind
    model: str
    logprobs: bool = False
    usage_wanted: bool = False
    offset: int = 0  # characters of a plain completion so far
    created: int = field(default_factory=lambda: int(time.time()))
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        scored = tuple(one for piece in pieces for one in piece.scored)
        finish = pieces[-1].finish
        choice: dict[str, Any] = {"index": 0}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice |= {"logprobs": self._logprobs(scored), "finish_reason": finish}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(name), "choices": [choice], "usage": usage}

    def opening(self) -> bytes:
        """The event that says who speaks; nothing in a plain completion."""
        return self._event({"role": "assistant", "content": ""}, None, None) if self.kind == "chat" else b""

    def event(self, piece: Piece) -> bytes:
        scored = self._logprobs(piece.scored) if piece.scored or not piece.finish else None
        if self.kind == "text":
            return self._event(piece.text, scored, piece.finish)
        if piece.finish is None:
            return self._event({"content": piece.text}, scored, None)
        last = self._event({}, None, piece.finish)  # the end of a chat's answer holds no text
        return (self._event({"content": piece.text}, scored, None) if piece.text or scored else b"") + last

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return _sse({**self._head(self._chunk_name), "choices": [], "usage": usage})

    @staticmethod
    def error_event(body: dict[str, Any]) -> bytes:
        return _sse(body)

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {"id": f"{prefix}-{self.token}", "object": name, "created": self.created, "model": self.model}

    def _event(self, content: Any, logprobs: Any, finish: str | None) -> bytes:
        key = "delta" if self.kind == "chat" else "text"
        choice = {"index": 0, key: content, "logprobs": logprobs, "finish_reason": finish}
        values: dict[str, Any] = {**self._head(self._chunk_name), "choices": [choice]}
        if self.usage_wanted:
            values["usage"] = None
        return _sse(values)

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._chat_token(one) for one in scored], "refusal": None}
        offsets = []
        for one in scored:
            offsets.append(self.offset)
            self.offset += len(one.text)
        return {
            "tokens": [one.text for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [dict(one.top) for one in scored] if any(one.top for one in scored) else None,
            "text_offset": offsets,
        }

    @staticmethod
    def _chat_token(one: Scored) -> dict[str, Any]:
        def entry(text: str, logprob: float) -> dict[str, Any]:
            # A token that is a part of a character has no text of its own, and its bytes are not known here.
            data = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": data}

        return {**entry(one.text, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _sse(values: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
