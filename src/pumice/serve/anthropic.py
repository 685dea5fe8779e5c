"""Anthropic's protocol, /v1/messages, as a translation of the chat's.

Source: Anthropic's API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator

from pumice.serve.answers import AnswerForm, AnswerModel, AnswerPiece, named_event
from pumice.serve.messages import (
    ImageUrlPart,
    Name,
    PartList,
    PartModel,
    RequestModel,
    TextOrList,
    TextPart,
    field_error,
    told_apart_by,
)
from pumice.serve.protocol import (
    MAX_MESSAGES,
    MAX_STOP,
    MAX_STOPS,
    BaseRequest,
    ChatRequest,
    ErrorBody,
    ErrorDetail,
    Temperature,
    TopK,
    TopP,
    Usage,
)

# --- requests ---


class TextBlock(PartModel):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = Field(None, description="Taken and not used.")


class ImageSource(RequestModel):
    type: Literal["base64", "url"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> ImageSource:
        needed, other = ("url", "data") if self.type == "url" else ("data", "url")
        if not getattr(self, needed):
            raise field_error(needed, f"the type '{self.type}' needs {needed}")
        if getattr(self, other) is not None:
            raise field_error(other, f"does not belong to the type '{self.type}'")
        return self


class ImageBlock(PartModel):
    type: Literal["image"]
    source: ImageSource


ShownBlock = Annotated[
    Annotated[TextBlock, Tag("~text")] | Annotated[ImageBlock, Tag("~image")],
    told_apart_by("type", {"image": "~image"}, "~text"),
]


class ToolUseBlock(PartModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(PartModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: TextOrList[ShownBlock] | None = None
    is_error: bool | None = Field(None, description="Taken and not used.")


class ThinkingBlock(BaseModel):
    """Taken and not used: this server's models do not think apart."""

    model_config = ConfigDict(extra="allow")

    type: Literal["thinking", "redacted_thinking"]


Block = Annotated[
    Annotated[TextBlock, Tag("~text")]
    | Annotated[ImageBlock, Tag("~image")]
    | Annotated[ToolUseBlock, Tag("~tool_use")]
    | Annotated[ToolResultBlock, Tag("~tool_result")]
    | Annotated[ThinkingBlock, Tag("~thinking")],
    told_apart_by(
        "type",
        {
            **{kind: f"~{kind}" for kind in ("image", "tool_use", "tool_result", "thinking")},
            "redacted_thinking": "~thinking",
        },
        "~text",
    ),
]


class AnthropicTurn(RequestModel):
    role: Literal["user", "assistant"]
    content: TextOrList[Block]

    @model_validator(mode="after")
    def _check_blocks(self) -> AnthropicTurn:
        blocks = () if isinstance(self.content, str) else self.content
        other = ToolUseBlock if self.role == "user" else ToolResultBlock
        for block in blocks:
            if isinstance(block, other):
                raise field_error("content", f"a {block.type} block does not belong to the role {self.role}")
        return self


class AnthropicTool(RequestModel):
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(None, description="Calls are always held to the schema.")
    cache_control: dict[str, Any] | None = Field(None, description="Taken and not used.")


class AnthropicChoice(RequestModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = Field(None, description="An answer has one call at most.")

    @model_validator(mode="after")
    def _check_name(self) -> AnthropicChoice:
        if (self.type == "tool") != (self.name is not None):
            raise field_error("name", "is the tool's, where the type is 'tool'")
        return self


class Thinking(RequestModel):
    type: Literal["disabled"]


class AnthropicRequest(BaseRequest):
    VERBATIM: ClassVar[frozenset[str]] = RequestModel.VERBATIM | {"input", "input_schema"}

    max_tokens: int = Field(ge=1)
    messages: list[AnthropicTurn] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="A last answer is continued."
    )
    system: TextOrList[ShownBlock] | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP)]] | None = Field(
        None, max_length=MAX_STOPS
    )
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=128)
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    metadata: dict[str, Any] | None = Field(None, description="Taken and not used, as the next one.")
    service_tier: str | None = None

    def chat(self) -> ChatRequest:
        """Return the request as one for a chat."""
        messages = [{"role": "system", "content": _parts("system", self.system)}] if self.system else []
        for number, turn in enumerate(self.messages):
            messages += _messages(f"messages.{number}.content", turn)
        choice = self.tool_choice or AnthropicChoice(type="auto")
        named = {"function": {"name": choice.name or ""}}
        asked: dict[str, Any] = {
            "messages": messages,
            "stop": self.stop_sequences,
            "continue_final_message": self.messages[-1].role == "assistant",
            "tools": [
                {"function": {"name": t.name, "description": t.description, "parameters": t.input_schema}}
                for t in (self.tools or () if choice.type != "none" else ())
            ],
            "tool_choice": {"any": "required", "tool": named}.get(choice.type),
        }
        same = {"model", "max_tokens", "stream", "temperature", "top_p", "top_k"}
        return ChatRequest(**self.model_dump(include=same), **asked)


def _messages(field: str, turn: AnthropicTurn) -> list[dict[str, Any]]:
    """Return a turn as messages of a chat: a tool's results each become one."""
    blocks = [] if isinstance(turn.content, str) else turn.content
    content = _parts(field, turn.content)
    if turn.role == "assistant":
        calls = [
            {"id": block.id, "function": {"name": block.name, "arguments": block.input}}
            for block in blocks
            if isinstance(block, ToolUseBlock)
        ]
        return [{"role": "assistant", "content": content, "tool_calls": calls}]
    results = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _parts(f"{field}.{number}.content", block.content or ""),
        }
        for number, block in enumerate(blocks)
        if isinstance(block, ToolResultBlock)
    ]
    return [*results, {"role": "user", "content": content}] if content or not results else results


def _parts(field: str, content: str | Sequence[Block]) -> str | PartList:
    """Return the texts and pictures of a content."""
    if isinstance(content, str):
        return content
    parts: PartList = []
    for number, block in enumerate(content):
        if isinstance(block, TextBlock):
            parts.append(TextPart(type="text", text=block.text))
        elif isinstance(block, ImageBlock):
            source = block.source
            url = source.url or f"data:{source.media_type or 'image/png'};base64,{source.data}"
            parts.append(ImageUrlPart.named(f"{field}.{number}.source", url))
    return parts


# --- answers ---


class AnthropicUsage(AnswerModel):
    input_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens: int


class AnthropicText(AnswerModel):
    type: Literal["text"] = "text"
    text: str


class AnthropicCall(AnswerModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicAnswer(AnswerModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnthropicText | AnthropicCall]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicDelta(AnswerModel):
    type: Literal["text_delta", "input_json_delta"] | None = None
    text: str | None = None
    partial_json: str | None = None
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class AnthropicEvent(AnswerModel):
    """An event of a stream. Which fields it has follows from its type."""

    type: str
    index: int | None = None
    message: AnthropicAnswer | None = None
    content_block: AnthropicText | AnthropicCall | None = None
    delta: AnthropicDelta | None = None
    usage: AnthropicUsage | None = None


# Type or code of an error -> the type that it has here, where that is another.
_ERROR_TYPES = {
    "request_too_large": "request_too_large",
    "server_error": "api_error",
    "service_unavailable_error": "overloaded_error",
}


class AnthropicError(AnswerModel):
    type: Literal["error"] = "error"
    error: ErrorDetail

    @classmethod
    def of(cls, error: ErrorDetail) -> AnthropicError:
        kind = _ERROR_TYPES.get(error.code or "") or _ERROR_TYPES.get(error.type, error.type)
        return cls(error=error.model_copy(update={"type": kind}))


class AnthropicForm(AnswerForm):
    """Writes the answer to a request, whole or as events: a text, a call, or both, each in a block."""

    def __init__(self, model: str, request: AnthropicRequest) -> None:
        self._model, self._stops = model, request.stop_sequences or ()
        self._id = f"msg_{secrets.token_hex(12)}"
        self._last = AnswerPiece()
        self._blocks = 0  # that have begun

    def response(self, answers: Sequence[AnswerPiece], usage: Usage) -> AnthropicAnswer:
        self._last = answer = answers[0]
        content: list[AnthropicText | AnthropicCall] = []
        if answer.text:
            content.append(AnthropicText(text=answer.text))
        if answer.name:  # a call that is cut off has no input, as in a stream
            values = json.loads(answer.arguments) if answer.finish == "tool_calls" else {}
            content.append(AnthropicCall(id=answer.call_id, name=answer.name, input=values))
        return self._answer(content, _usage(usage))

    def begin(self, usage: Usage) -> bytes:
        return self._event("message_start", message=self._answer([], _usage(usage)))

    def piece(self, piece: AnswerPiece) -> bytes:
        self._last = piece
        events = b""
        if piece.text:
            if not self._blocks:
                events += self._open(AnthropicText(text=""))
            events += self._grow(AnthropicDelta(type="text_delta", text=piece.text))
        if piece.name:
            events += self._close() + self._open(AnthropicCall(id=piece.call_id, name=piece.name, input={}))
        if piece.name or piece.arguments:
            events += self._grow(AnthropicDelta(type="input_json_delta", partial_json=piece.arguments))
        return events

    def end(self, usage: Usage) -> bytes:
        events = self._close()
        events += self._event("message_delta", delta=AnthropicDelta(**self._ending()), usage=_usage(usage))
        return events + self._event("message_stop")

    def error(self, error: ErrorBody) -> bytes:
        return named_event("error", AnthropicError.of(error.error))

    def _open(self, block: AnthropicText | AnthropicCall) -> bytes:
        self._blocks += 1
        return self._event("content_block_start", index=self._blocks - 1, content_block=block)

    def _grow(self, delta: AnthropicDelta) -> bytes:
        return self._event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> bytes:
        """End the last block, if there is one."""
        return self._event("content_block_stop", index=self._blocks - 1) if self._blocks else b""

    def _event(self, kind: str, **fields: Any) -> bytes:
        return named_event(kind, AnthropicEvent(type=kind, **fields))

    def _ending(self) -> dict[str, str | None]:
        """Return why the answer ended, None as long as it has not."""
        reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        if self._last.stop in self._stops:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._last.stop}
        return {"stop_reason": reasons.get(self._last.finish or ""), "stop_sequence": None}

    def _answer(self, content: list[AnthropicText | AnthropicCall], usage: AnthropicUsage) -> AnthropicAnswer:
        return AnthropicAnswer(id=self._id, model=self._model, content=content, usage=usage, **self._ending())


def _usage(usage: Usage) -> AnthropicUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return AnthropicUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
    )
