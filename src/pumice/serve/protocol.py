"""The requests and responses of OpenAI's protocol that this server supports, as pydantic models.

/openapi.json is generated from these classes; `openapi.PUBLISHED_NAMES` has the names that differ there.
A request with an unknown field is an error that names the field, so no option is ignored silently.
Source of the fields: OpenAI's API reference; `top_k` and `repetition_penalty` are those of vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_STOPS = 16
MAX_MESSAGES = 1024


class RequestModel(BaseModel):
    """A part of a request: exact types, no unknown fields, no infinite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# --- requests ---


class ImageUrl(RequestModel):
    url: str = Field(min_length=1, description="data:image/...;base64,..., or http(s) where that is allowed")
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="Taken and not used: the model's own image policy decides."
    )


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ImageUrlPart(RequestModel):
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


class BaseRequest(RequestModel):
    """The field that every request has."""

    model: str | None = Field(None, description="One of /v1/models; the first of them when left out.")


class GenerationRequest(BaseRequest):
    """The fields that chat and plain completion share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Texts | None = None
    n: int | None = Field(None, ge=1, le=1)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    user: str | None = Field(None, description="Taken and not used, as the next three.")
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        """Return the field that limits the answer's length, and its value in tokens."""
        return "max_tokens", self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return () if not self.stop else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ConversationRequest(BaseRequest):
    """A request with messages, which may hold pictures."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)

    @property
    def images(self) -> list[tuple[str, ImageUrl]]:
        """Return (field name, picture) for each picture, in the order of the request."""
        return [
            (f"messages.{m}.content.{p}.image_url", part.image_url)
            for m, message in enumerate(self.messages)
            if not isinstance(message.content, str)
            for p, part in enumerate(message.content)
            if isinstance(part, ImageUrlPart)
        ]


class ChatRequest(ConversationRequest, GenerationRequest):
    max_completion_tokens: int | None = Field(None, ge=1, description="Counts before max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


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
