"""The requests and responses of OpenAI's protocol that this server supports, as pydantic models.

/openapi.json is generated from these classes; `openapi.PUBLISHED_NAMES` has the names that differ there.
A request with an unknown field is an error that names the field, so no option is ignored silently.
Source of the fields: OpenAI's API reference; `top_k`, `min_p` and `repetition_penalty` are those of vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import from_json

T = TypeVar("T", bound=BaseModel)

MAX_STOPS = 16
MAX_MESSAGES = 1024


class RequestModel(BaseModel):
    """A part of a request: exact types, no unknown fields, no infinite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# --- requests ---

# Fields -> values that ask for nothing. They are taken as if the field were absent, as null is.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_calls": ([],),
    "chat_template_kwargs": ({},),
    "reasoning_effort": ("none",),
    "modalities": ([],),
    "stop": ([],),
}
VERBATIM = ("schema", "parameters")  # JSON schemas, in which null has a meaning


def parse(kind: type[T], body: bytes) -> T:
    """Return the body as a request of this kind, without what is null or asks for nothing.

    Raises ValueError if it is not JSON, and pydantic's ValidationError if it is no such request.
    """
    values = _drop_nothing(from_json(body, allow_inf_nan=False))
    return kind.model_validate(values)


def _drop_nothing(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_nothing(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if item is not None}
    if kept.get("tool_choice") == "none":
        kept.pop("tools", None)
    return {
        key: item if key in VERBATIM else _drop_nothing(item)
        for key, item in kept.items()
        if item not in ASKS_NOTHING.get(key, ())
    }


class ImageUrl(RequestModel):
    url: str = Field(min_length=1, description="data:image/...;base64,..., or http(s) where that is allowed")
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="Taken and not used: the model's own image policy decides."
    )


class PartModel(RequestModel):
    cache_control: dict[str, Any] | None = Field(None, description="Taken and not used.")


class TextPart(PartModel):
    type: Literal["text"]
    text: str


class ImageUrlPart(PartModel):
    type: Literal["image_url"]
    image_url: ImageUrl


def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "~image" if kind == "image_url" else "~text"


def _text_or_list_tag(value: Any) -> str:
    return "~list" if isinstance(value, list) else "~string"


Part = Annotated[
    Annotated[TextPart, Tag("~text")] | Annotated[ImageUrlPart, Tag("~image")], Discriminator(_part_tag)
]
Content = Annotated[
    Annotated[str, Tag("~string")] | Annotated[list[Part], Tag("~list")], Discriminator(_text_or_list_tag)
]
Texts = Annotated[
    Annotated[str, Tag("~string")]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS), Tag("~list")],
    Discriminator(_text_or_list_tag),
]


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="Taken and not used: templates know roles only.")


class PastAnswer(RequestModel):
    """An answer of before, with the fields that servers and libraries add to one."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = Field(None, description="Read as the answer's text where content is empty.")
    annotations: list[Any] | None = Field(None, description="Taken and not used, as the next three.")
    reasoning: Any = None
    reasoning_content: Any = None
    provider_specific_fields: dict[str, Any] | None = None


def _message_tag(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return "~assistant" if role == "assistant" else "~other"


AnyMessage = Annotated[
    Annotated[PastAnswer, Tag("~assistant")] | Annotated[ChatMessage, Tag("~other")],
    Discriminator(_message_tag),
]


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(RequestModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Answers are always held to the schema.")


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type 'json_schema' belong together")
        return self


_LIMIT = "The longest answer; -1, and what does not fit, is as long as it fits."


def _check_limit(tokens: int) -> int:
    if tokens == 0:
        raise ValueError("Input should be greater than or equal to 1, or -1 for as long as it fits")
    return tokens


Limit = Annotated[int, Field(ge=-1), AfterValidator(_check_limit)]


class BaseRequest(RequestModel):
    """The field that every request has."""

    model: str | None = Field(None, description="One of /v1/models; the first of them when left out.")


class GenerationRequest(BaseRequest):
    """The fields that chat and plain completion share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = Field(None, description=_LIMIT)
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Texts | None = None
    n: int | None = Field(None, ge=1, le=1)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    user: str | None = Field(None, description="Taken and not used, as the next six.")
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def limit(self) -> int | None:
        """Return the tokens that limit the answer's length; -1 for as many as fit."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return () if not self.stop else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ConversationRequest(BaseRequest):
    """A request with messages, which may hold pictures."""

    messages: list[AnyMessage] = Field(min_length=1, max_length=MAX_MESSAGES)

    @property
    def images(self) -> list[tuple[str, ImageUrl]]:
        """Return (field name, picture) for each picture, in the order of the request."""
        return [
            (f"messages.{m}.content.{p}.image_url", part.image_url)
            for m, message in enumerate(self.messages)
            if isinstance(message.content, list)
            for p, part in enumerate(message.content)
            if isinstance(part, ImageUrlPart)
        ]


class ChatRequest(ConversationRequest, GenerationRequest):
    max_completion_tokens: Limit | None = Field(None, description="Counts before max_tokens.")
    continue_final_message: bool | None = Field(
        None,
        description="The last message is the answer's beginning; add_generation_prompt is false then.",
    )
    add_generation_prompt: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_continued(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ExplainRequest(ConversationRequest):
    """Its last message is the assistant's: the answer to explain."""


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        Annotated[str, Tag("~string")]
        | Annotated[list[str], Field(min_length=1, max_length=1), Tag("~list")],
        Discriminator(_text_or_list_tag),
    ] = Field(description="Text as it is, without the model's template; or a list of one.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = Field(None, ge=1, le=1)

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


# --- responses ---

Finish = Literal["stop", "length"]


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Of the prompt, taken from the prefix cache.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class LogprobEntry(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[LogprobEntry]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ExplainedWord(BaseModel):
    text: str
    start: int = Field(description="Where it stands in the answer, in UTF-16 units.")
    end: int
    content: bool = Field(description="Whether it is more than grammar.")
    shown: float = Field(description="Natural logarithm of its probability.")
    grey: float = Field(description="The same with the pictures grey.")
    dropped: float = Field(description="The same without pictures.")
    share: float = Field(description="Of its attention, on the pictures.")


class ExplanationBody(BaseModel):
    """More stands beside it, packed, for `mount` of /page/explain.js."""

    model_config = ConfigDict(extra="allow")

    format: Literal[1]
    question: str
    answer: str
    words: list[ExplainedWord]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "draining"]
    version: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
