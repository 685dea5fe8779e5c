"""What requests are made of: messages, pictures, tools and schemas; and what is dropped before checks.

Sources of the fields: OpenAI's API reference; vLLM's, llama.cpp's and TGI's documentation for theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from pumice.errors import CAUSE, InputError
from pumice.jsonl import parse_json, wrong_json

T = TypeVar("T", bound="RequestModel")
Item = TypeVar("Item")


def field_error(field: str, message: str) -> PydanticCustomError:
    """Return the error of a validator that sees all of a request: the field, seen from there, is wrong."""
    return PydanticCustomError("invalid_value", "{message}", {"field": field, "message": message})


# Fields -> values that ask for nothing. They are taken as if the field were absent, as null and [] are.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    field: values
    for fields, values in (
        ("add_special_tokens shift skip_special_tokens spaces_between_special_tokens truncate", (True,)),
        ("backend_sampling cache_prompt include_reasoning", (True, False)),
        (
            "continuous_usage_stats early_stopping echo enable_thinking ignore_eos logprobs safe_prompt "
            "include_stop_str_in_output return_token_ids return_tokens_as_token_ids timings_per_token "
            "use_beam_search",
            (False,),
        ),
        ("best_of length_penalty tfs_z typ_p typical_p", (1,)),
        (
            "dry_multiplier dynatemp_range min_tokens mirostat priority top_a top_logprobs xtc_probability",
            (0,),
        ),
        ("id_slot seed", (-1,)),
        ("function_call tool_choice", ("none", "auto", "")),
        ("grammar guided_grammar guided_regex response_format stop", ("",)),
    )
    for field in fields.split()
}
# Settings of samplers that another field would have to turn on; that one is refused.
NEEDS_ANOTHER = frozenset(
    {
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "mirostat_eta",
        "mirostat_tau",
        "xtc_threshold",
    }
)
# An empty one is wrong, not absent.
NEVER_EMPTY = frozenset({"messages", "content", "prompt", "input", "output"})


class RequestModel(BaseModel):
    """A part of a request: exact types, no unknown fields, no infinite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    # Fields whose values are the user's own JSON, such as a schema, in which null has a meaning.
    VERBATIM: ClassVar[frozenset[str]] = frozenset(
        {"schema", "parameters", "arguments", "guided_json", "json", "value"}
    )
    ASKS_NOTHING: ClassVar[Mapping[str, tuple[Any, ...]]] = ASKS_NOTHING


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def parse(kind: type[T], body: bytes) -> T:
    """Return the body as a request of this kind, without what is null or asks for nothing.

    Raises InputError if it is not JSON, and pydantic's ValidationError if it is no such request.
    """
    return kind.model_validate(_drop_nothing(_read_json(body), kind))


def _read_json(body: bytes) -> Any:
    """Return the value of a body. Raises InputError that says in plain words why it is not JSON."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        with wrong_json(f"the body is not JSON: {CAUSE}"):
            json.loads(body.decode())
        raise InputError(f"the body is not JSON: {error}") from error  # what Python takes, as NaN


def _drop_nothing(value: Any, kind: type[RequestModel]) -> Any:
    if isinstance(value, list):
        return [_drop_nothing(item, kind) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = ("tools",) if value.get("tool_choice") == "none" else ()
    kept_whole = kind.VERBATIM
    if not (isinstance(schema := value.get("json_schema"), dict) and "schema" in schema):
        kept_whole |= {"json_schema"}  # llama.cpp's is the schema itself, OpenAI's has it in a field
    kept = {
        key: item if key in kept_whole else _drop_nothing(item, kind)
        for key, item in value.items()
        if key not in dropped
    }
    nothings = kind.ASKS_NOTHING
    return {
        key: item
        for key, item in kept.items()
        if not _asks_nothing(key, item, key in kept_whole, nothings.get(key, ()))
    }


def _asks_nothing(key: str, value: Any, is_verbatim: bool, nothings: tuple[Any, ...]) -> bool:
    if value is None or key in NEEDS_ANOTHER:
        return True
    if isinstance(value, list | dict):
        return not (value or is_verbatim or key in NEVER_EMPTY)
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in nothings
    )


def json_kind(value: Any) -> str:
    """Return the tag of a union's member for a text, a list or an object. Tags begin with ~."""
    if isinstance(value, dict | BaseModel):
        return "~object"
    return "~list" if isinstance(value, list) else "~string"


def prompt_kind(value: Any) -> str:
    """Return the tag of a prompt: a text, texts, token ids, or several of these."""
    if not isinstance(value, list):
        return "~string"
    first = value[0] if value else ""
    return "~texts" if isinstance(first, str) else "~lists" if isinstance(first, list) else "~ids"


TextOrList = Annotated[
    Annotated[str, Tag("~string")] | Annotated[list[Item], Tag("~list")], Discriminator(json_kind)
]


def told_apart_by(field: str, tags: Mapping[str, str], other: str) -> Discriminator:
    """Tell the members of a union apart by a field. tags: its value -> a tag; other: that of all others."""

    def tag(value: Any) -> str:
        kind = _field(value, field)
        return tags.get(kind, other) if isinstance(kind, str) else other

    return Discriminator(tag)


def _field(value: Any, name: str) -> Any:
    """Return a field of what may be an object, not checked so far; None if there is none."""
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


# --- messages ---


def _as_object(value: Any) -> Any:
    """Accept a bare address, as some clients write it."""
    return {"url": value} if isinstance(value, str) else value


class ImageUrl(RequestModel):
    url: str = Field(min_length=1, description="data:image/...;base64,..., or http(s) where that is allowed")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Taken and not used, as the next one: the model's own image policy decides."
    )
    format: str | None = None


class PartModel(RequestModel):
    cache_control: dict[str, Any] | None = Field(None, description="Taken and not used, as the next one.")
    uuid: str | None = None


class MessageModel(RequestModel):
    name: str | None = Field(None, description="Taken and not used, as the next one.")
    cache_control: dict[str, Any] | None = None


class TextPart(PartModel):
    type: Literal["text"]
    text: str


class RefusalPart(RequestModel):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ImageUrlPart(PartModel):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_object)]
    _field: str | None = PrivateAttr(None)  # its name in a request of another protocol

    @classmethod
    def named(cls, field: str, url: str) -> ImageUrlPart:
        """Return a picture's part. An error about it names this field of the request."""
        part = cls(type="image_url", image_url=ImageUrl(url=url))
        part._field = field
        return part

    @property
    def field(self) -> str | None:
        return self._field


class VideoUrl(RequestModel):
    url: str = Field(min_length=1, description="data:video/...;base64,...; also of a GIF or an animated WebP")


class VideoUrlPart(PartModel):
    """A video, as vLLM takes it."""

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_as_object)]


Part = Annotated[
    Annotated[TextPart, Tag("~text")]
    | Annotated[ImageUrlPart, Tag("~image")]
    | Annotated[VideoUrlPart, Tag("~video")]
    | Annotated[RefusalPart, Tag("~refusal")],
    told_apart_by("type", {"image_url": "~image", "video_url": "~video", "refusal": "~refusal"}, "~text"),
]
Content = TextOrList[Part]


PartList = list[TextPart | ImageUrlPart | VideoUrlPart | RefusalPart]


class ChatMessage(MessageModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content


def _check_arguments(arguments: str) -> str:
    """Return the arguments of a call as JSON; "" is no arguments."""
    if not isinstance(parse_json(arguments or "{}"), dict):
        raise ValueError("Input should be a JSON object, written as text")
    return arguments or "{}"


Arguments = Annotated[
    str,
    BeforeValidator(lambda value: json.dumps(value) if isinstance(value, dict) else value),
    AfterValidator(_check_arguments),
]


class CalledFunction(RequestModel):
    name: str
    arguments: Arguments = "{}"
    parsed_arguments: Any = Field(None, description="Taken and not used: the arguments as an object.")


class PastCall(RequestModel):
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = Field(None, description="Taken and not used, as the next one.")
    provider_specific_fields: dict[str, Any] | None = None
    function: CalledFunction


class PastAnswer(MessageModel):
    """An answer of before, with the fields that servers and libraries add to one."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[PastCall] | None = None
    function_call: CalledFunction | None = Field(None, description="The older form of tool_calls.")
    refusal: str | None = Field(None, description="Read as the answer's text where content is empty.")
    prefix: bool | None = Field(None, description="As continue_final_message, of a last answer.")
    annotations: list[Any] | None = Field(None, description="Taken and not used, as the next fields.")
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None
    thinking_blocks: Any = None
    parsed: Any = None
    provider_specific_fields: dict[str, Any] | None = None


class ToolMessage(MessageModel):
    """What a tool gave for a call of an earlier answer."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


class FunctionMessage(MessageModel):
    """The older form of a tool's message."""

    role: Literal["function"]
    content: Content


AnyMessage = Annotated[
    Annotated[PastAnswer, Tag("~assistant")]
    | Annotated[ToolMessage, Tag("~tool")]
    | Annotated[FunctionMessage, Tag("~function")]
    | Annotated[ChatMessage, Tag("~other")],
    told_apart_by("role", {"assistant": "~assistant", "tool": "~tool", "function": "~function"}, "~other"),
]


# --- tools ---

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDescription(RequestModel):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON Schema of an object.")
    strict: bool | None = Field(None, description="Calls are always held to the schema.")


class ToolDescription(RequestModel):
    type: Literal["function"] = "function"
    function: FunctionDescription
    cache_control: dict[str, Any] | None = Field(None, description="Taken and not used.")


class FunctionName(RequestModel):
    name: str


class NamedFunction(RequestModel):
    type: Literal["function"] = "function"
    function: FunctionName


class AllowedFunctions(RequestModel):
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1, max_length=128)


class AllowedTools(RequestModel):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


def choice_tag(value: Any) -> str:
    """Return the tag of a tool_choice: a text, a function's name, or several of them."""
    if json_kind(value) != "~object":
        return "~string"
    return "~allowed" if _field(value, "type") == "allowed_tools" else "~object"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~string")]
    | Annotated[NamedFunction, Tag("~object")]
    | Annotated[AllowedTools, Tag("~allowed")],
    Discriminator(choice_tag),
]


# --- what an answer is held to ---


class JsonSchemaFormat(RequestModel):
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Answers are always held to the schema.")


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: JsonSchemaFormat | None = None
    value: Any = Field(None, description='TGI\'s: the schema, {"schema": ...}, or a regular expression.')
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="llama.cpp's, of json_object.")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and not isinstance(self.value, dict):
            raise field_error("json_schema", "the type 'json_schema' needs a schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise field_error("json_schema", "belongs to the type 'json_schema'")
        if self.type == "regex" and not isinstance(self.value, str):
            raise field_error("value", "the type 'regex' needs a regular expression")
        if self.type == "json" and not isinstance(self.value, dict):
            raise field_error("value", "the type 'json' needs a schema")
        return self

    @property
    def schema_or_none(self) -> dict[str, Any] | None:
        """Return the JSON Schema, or None for any object."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        value = self.value if isinstance(self.value, dict) else self.schema_
        if value is None:
            return None
        inner = value.get("schema")
        if isinstance(inner, dict) and not {"type", "properties"} & set(value):
            value = inner
        return {"type": "object", **value} if "properties" in value else value


class StructuredOutputs(RequestModel):
    """vLLM's: what the answer is held to. One of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    disable_any_whitespace: bool | None = Field(None, description="Taken and not used, as the next one.")
    disable_fallback: bool | None = None
