"""Anthropic's protocol, /v1/messages, as a translation of the chat's.

Source: Anthropic's API reference, "Messages" and "Streaming messages".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from pumice.serve.answers import AnswerForm, AnswerModel, AnswerPiece
from pumice.serve.messages import (
    CalledFunction,
    ChatMessage,
    FunctionDescription,
    FunctionName,
    ImageUrl,
    ImageUrlPart,
    Name,
    NamedFunction,
    PartList,
    PartModel,
    PastAnswer,
    PastCall,
    RequestModel,
    TextPart,
    ToolChoice,
    ToolDescription,
    ToolMessage,
    json_kind,
)
from pumice.serve.protocol import (
    MAX_MESSAGES,
    MAX_STOP,
    MAX_STOPS,
    BaseRequest,
    ChatRequest,
    ErrorBody,
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


class ImageBlock(PartModel):
    type: Literal["image"]
    source: ImageSource


class ToolUseBlock(PartModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(PartModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: BlockContent | None = None
    is_error: bool | None = Field(None, description="Taken and not used.")


class ThinkingBlock(BaseModel):
    """Taken and not used: this server's models do not think apart."""

    model_config = ConfigDict(extra="allow")

    type: Literal["thinking", "redacted_thinking"]


_KINDS = {
    "image": "~image", "tool_use": "~tool_use", "tool_result": "~tool_result",
    "thinking": "~thinking", "redacted_thinking": "~thinking",
}  # fmt: skip


def _block_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _KINDS.get(kind, "~text") if isinstance(kind, str) else "~text"


Block = Annotated[
    Annotated[TextBlock, Tag("~text")]
    | Annotated[ImageBlock, Tag("~image")]
    | Annotated[ToolUseBlock, Tag("~tool_use")]
    | Annotated[ToolResultBlock, Tag("~tool_result")]
    | Annotated[ThinkingBlock, Tag("~thinking")],
    Discriminator(_block_tag),
]
BlockContent = Annotated[
    Annotated[str, Tag("~string")] | Annotated[list[Block], Tag("~list")], Discriminator(json_kind)
]


class AnthropicTurn(RequestModel):
    role: Literal["user", "assistant"]
    content: BlockContent


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


class Thinking(RequestModel):
    type: Literal["disabled"]


class AnthropicRequest(BaseRequest):
    VERBATIM: ClassVar[frozenset[str]] = RequestModel.VERBATIM | {"input", "input_schema"}

    max_tokens: int = Field(ge=1)
    messages: list[AnthropicTurn] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="A last answer is continued."
    )
    system: BlockContent | None = None
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
        messages: list[Any] = []
        if self.system:
            messages.append(ChatMessage(role="system", content=_parts("system", self.system)))
        for number, turn in enumerate(self.messages):
            messages += _messages(f"messages.{number}.content", turn)
        choice = self.tool_choice
        tools = self.tools if choice is None or choice.type != "none" else ()
        return ChatRequest(
            model=self.model,
            messages=messages,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            continue_final_message=self.messages[-1].role == "assistant",
            tools=[
                ToolDescription(
                    function=FunctionDescription(
                        name=tool.name, description=tool.description, parameters=tool.input_schema
                    ),
                )
                for tool in tools or ()
            ],
            tool_choice=None if choice is None else _tool_choice(choice),
        )


def _tool_choice(choice: AnthropicChoice) -> ToolChoice | None:
    if choice.type == "tool":
        return NamedFunction(function=FunctionName(name=choice.name or ""))
    return "required" if choice.type == "any" else None


def _messages(field: str, turn: AnthropicTurn) -> list[ChatMessage | PastAnswer | ToolMessage]:
    """Return a turn as messages of a chat: a tool's results each become one."""
    blocks = [] if isinstance(turn.content, str) else turn.content
    results: list[ChatMessage | PastAnswer | ToolMessage] = [
        ToolMessage(
            role="tool",
            content=_parts(f"{field}.{number}.content", block.content or ""),
            tool_call_id=block.tool_use_id,
        )
        for number, block in enumerate(blocks)
        if isinstance(block, ToolResultBlock)
    ]
    content = _parts(field, turn.content)
    if turn.role == "user":
        return [*results, ChatMessage(role="user", content=content)] if content or not results else results
    calls = [
        PastCall(id=block.id, function=CalledFunction(name=block.name, arguments=json.dumps(block.input)))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return [PastAnswer(role="assistant", content=content, tool_calls=calls)]


def _parts(field: str, content: str | list[Any]) -> str | PartList:
    """Return the texts and pictures of a content."""
    if isinstance(content, str):
        return content
    parts: PartList = []
    for number, block in enumerate(content):
        if isinstance(block, TextBlock):
            parts.append(TextPart(type="text", text=block.text))
        elif isinstance(block, ImageBlock):
            source = block.source
            url = source.url or f"data:{source.media_type or 'image/png'};base64,{source.data or ''}"
            image = ImageUrlPart(type="image_url", image_url=ImageUrl(url=url))
            parts.append(image.named(f"{field}.{number}.source"))
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


class AnthropicError(ErrorBody):
    type: Literal["error"] = "error"


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
        if answer.finish == "tool_calls":
            values = json.loads(answer.arguments)
            content.append(AnthropicCall(id=answer.call_id, name=answer.name, input=values))
        reason, stop = self._reason()
        return self._answer(content, _usage(usage), reason, stop)

    def begin(self) -> bytes:
        return self._event(
            "message_start", message=self._answer([], AnthropicUsage(input_tokens=0, output_tokens=0))
        )

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
        reason, stop = self._reason()
        delta = AnthropicDelta(stop_reason=reason, stop_sequence=stop)
        events += self._event("message_delta", delta=delta, usage=_usage(usage))
        return events + self._event("message_stop")

    def error(self, error: ErrorBody) -> bytes:
        return f"event: error\ndata: {AnthropicError(error=error.error).model_dump_json()}\n\n".encode()

    def _open(self, block: AnthropicText | AnthropicCall) -> bytes:
        self._blocks += 1
        return self._event("content_block_start", index=self._blocks - 1, content_block=block)

    def _grow(self, delta: AnthropicDelta) -> bytes:
        return self._event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> bytes:
        """End the last block, if there is one."""
        return self._event("content_block_stop", index=self._blocks - 1) if self._blocks else b""

    def _event(self, kind: str, **fields: Any) -> bytes:
        values = AnthropicEvent(type=kind, **fields).model_dump_json(exclude_unset=True)
        return f"event: {kind}\ndata: {values}\n\n".encode()

    def _reason(self) -> tuple[StopReason, str | None]:
        if self._last.stop in self._stops:
            return "stop_sequence", self._last.stop
        reasons: dict[Any, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}
        return reasons.get(self._last.finish, "end_turn"), None

    def _answer(
        self,
        content: list[AnthropicText | AnthropicCall],
        usage: AnthropicUsage,
        reason: StopReason | None = None,
        stop: str | None = None,
    ) -> AnthropicAnswer:
        return AnthropicAnswer(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=reason,
            stop_sequence=stop,
            usage=usage,
        )


def _usage(usage: Usage) -> AnthropicUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return AnthropicUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
    )
