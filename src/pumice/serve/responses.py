"""Requests of OpenAI's newer protocol, /v1/responses, as a translation to the chat's.

Source: OpenAI's API reference, "Responses".
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from pumice.serve.messages import (
    Arguments,
    ImageUrlPart,
    Name,
    PartList,
    PartModel,
    RequestModel,
    StreamOptions,
    TextOrList,
    TextPart,
    choice_tag,
    field_error,
    json_kind,
    told_apart_by,
)
from pumice.serve.protocol import (
    MAX_MESSAGES,
    ChatRequest,
    HintedRequest,
    Limit,
    Temperature,
    TopP,
)


class ItemText(PartModel):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(None, description="Taken and not used, as the next ones.")
    logprobs: list[Any] | None = None
    parsed: Any = None


class ItemImage(PartModel):
    type: Literal["input_image"]
    image_url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high", "original"] | None = Field(None, description="Taken and not used.")


class ItemRefusal(RequestModel):
    type: Literal["refusal"]
    refusal: str


ItemPart = Annotated[
    Annotated[ItemText, Tag("~text")]
    | Annotated[ItemImage, Tag("~input_image")]
    | Annotated[ItemRefusal, Tag("~refusal")],
    told_apart_by("type", {"input_image": "~input_image", "refusal": "~refusal"}, "~text"),
]
ItemContent = TextOrList[ItemPart]


class ItemModel(RequestModel):
    id: str | None = Field(None, description="Taken and not used, as the next one.")
    status: str | None = None


class MessageItem(ItemModel):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: ItemContent
    phase: str | None = Field(None, description="Taken and not used.")


class CallItem(ItemModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    parsed_arguments: Any = Field(None, description="Taken and not used: the arguments as an object.")


class CallOutputItem(ItemModel):
    type: Literal["function_call_output"]
    call_id: str
    output: ItemContent


class ReasoningItem(BaseModel):
    """Taken and not used: this server's models do not reason apart."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning"]


class ReferenceItem(RequestModel):
    """An item of an earlier answer, as `StoredItems` has it."""

    type: Literal["item_reference"] | None = None
    id: str


def _item_tag(value: Any) -> str:
    """Return the tag of an item. Its type may be left out of a message, and of a reference."""
    if not isinstance(value, dict):
        return f"~{getattr(value, 'type', None) or 'message'}"
    if value.keys() == {"id"}:
        return "~item_reference"
    kind = value.get("type")
    return f"~{kind}" if kind in _ITEM_KINDS else "~message"


_ITEM_KINDS = ("function_call", "function_call_output", "reasoning", "item_reference")
InputItem = Annotated[
    Annotated[MessageItem, Tag("~message")]
    | Annotated[CallItem, Tag("~function_call")]
    | Annotated[CallOutputItem, Tag("~function_call_output")]
    | Annotated[ReasoningItem, Tag("~reasoning")]
    | Annotated[ReferenceItem, Tag("~item_reference")],
    Discriminator(_item_tag),
]


class ResponsesTool(RequestModel):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


# As much as OpenAI allows: it comes back in three events of a stream.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ResponsesNamedTool(RequestModel):
    type: Literal["function"]
    name: str

    def chat(self) -> dict[str, Any]:
        return {"function": {"name": self.name}}


class ResponsesAllowedTools(RequestModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ResponsesNamedTool] = Field(min_length=1, max_length=128)

    def chat(self) -> dict[str, Any]:
        named = [tool.chat() for tool in self.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": named}}


class TextFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise field_error("schema", "the type 'json_schema' needs a schema")
        if self.type != "json_schema" and self.schema_ is not None:
            raise field_error("schema", "belongs to the type 'json_schema'")
        return self


class TextSettings(RequestModel):
    format: TextFormat | None = None
    verbosity: str | None = Field(None, description="Taken and not used.")


class ResponsesRequest(HintedRequest):
    ASKS_NOTHING: ClassVar = {**RequestModel.ASKS_NOTHING, "tool_choice": ("",)}  # the answer gives it back

    metadata: Metadata | None = Field(None, description="Comes back in the answer, and is not used.")
    store: bool | None = Field(
        None, description="Whether requests may refer to the answer; true if left out."
    )
    input: Annotated[
        Annotated[str, Tag("~string")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES), Tag("~list")],
        Discriminator(json_kind),
    ]
    instructions: str | None = Field(None, description="The system message.")
    max_output_tokens: Limit | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    text: TextSettings | None = None
    tools: list[ResponsesTool] | None = Field(None, max_length=128)
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("~string")]
            | Annotated[ResponsesNamedTool, Tag("~object")]
            | Annotated[ResponsesAllowedTools, Tag("~allowed")],
            Discriminator(choice_tag),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = Field(None, description="Of these, message.output_text.logprobs is known.")
    top_logprobs: int | None = Field(None, ge=0, le=20)
    background: Literal[False] | None = None
    truncation: Literal["disabled", "auto"] | None = Field(None, description="Nothing is ever left out.")
    reasoning: dict[str, Any] | None = Field(None, description="Taken and not used, as the next one.")
    max_tool_calls: int | None = None

    def chat(self) -> ChatRequest:
        """Return the request as one for a chat. It refers to no items."""
        messages: list[Any] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages += [m for number, item in enumerate(items) if (m := _message(number, item)) is not None]
        logprobs = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        choice, form = self.tool_choice, self.text.format if self.text else None
        asked: dict[str, Any] = {
            "messages": messages or [{"role": "user", "content": ""}],
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": logprobs,
            "top_logprobs": self.top_logprobs if logprobs else None,
            "response_format": _response_format(form),
            "tools": [{"function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()],
            "tool_choice": choice.chat() if isinstance(choice, BaseModel) else choice,
        }
        same = self.model_dump(include={"model", "stream", "temperature", "top_p"})
        return ChatRequest(**same, **asked)


def _message(number: int, item: InputItem) -> dict[str, Any] | None:
    """Return an item of the input as a message of a chat."""
    if isinstance(item, ReasoningItem):
        return None
    assert not isinstance(item, ReferenceItem)
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {"role": "assistant", "tool_calls": [{"id": item.call_id, "function": function}]}
    if isinstance(item, CallOutputItem):
        content = _content(f"input.{number}.output", item.output)
        return {"role": "tool", "tool_call_id": item.call_id, "content": content}
    return {"role": item.role, "content": _content(f"input.{number}.content", item.content)}


def _content(field: str, content: str | list[ItemPart]) -> str | PartList:
    if isinstance(content, str):
        return content
    parts: PartList = []
    for number, part in enumerate(content):
        if isinstance(part, ItemImage):
            parts.append(ImageUrlPart.named(f"{field}.{number}.image_url", part.image_url))
        else:
            text = part.refusal if isinstance(part, ItemRefusal) else part.text
            parts.append(TextPart(type="text", text=text))
    return parts


def _response_format(asked: TextFormat | None) -> dict[str, Any] | None:
    if asked is None or asked.schema_ is None:
        return None if asked is None else {"type": asked.type}
    return {"type": asked.type, "json_schema": {"schema": asked.schema_}}
