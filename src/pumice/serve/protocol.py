"""The requests and responses of OpenAI's protocol that this server supports, as pydantic models.

/openapi.json is generated from these classes; `openapi.PUBLISHED_NAMES` has the names that differ there.
A request with an unknown field is an error that names the field, so no option is ignored silently.
Source of the fields: OpenAI's API reference; `top_k`, `min_p`, `repetition_penalty`, `structured_outputs` and
`guided_json` are those of vLLM, `num_beams` and `length_penalty` those of transformers,
`response_format.value` is TGI's, `response_format.schema` llama.cpp's.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from pumice.serve.messages import (
    AnyMessage,
    ImageUrl,
    ImageUrlPart,
    PastAnswer,
    RequestModel,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
    ToolChoice,
    ToolDescription,
    VideoUrl,
    VideoUrlPart,
    field_error,
    json_kind,
    prompt_kind,
)

MAX_STOPS = 16
MAX_STOP = 1000  # characters: every new piece of an answer is compared with all of them
MAX_MESSAGES = 1024
MAX_ANSWERS = 128  # of one request, as OpenAI allows: prompts times `n`


# --- requests ---

Texts = Annotated[
    Annotated[str, Field(max_length=MAX_STOP), Tag("~string")]
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP)]],
        Field(max_length=MAX_STOPS),
        Tag("~list"),
    ],
    Discriminator(json_kind),
]


_BEAMS = ("length_penalty", "use_beam_search")  # 1 and false replace what the model's folder says
_LIMIT = "The longest answer; -1, and what does not fit, is as long as it fits."


def _check_limit(tokens: int) -> int:
    if tokens == 0:
        raise ValueError("Input should be greater than or equal to 1, or -1 for as long as it fits")
    return tokens


Limit = Annotated[int, Field(ge=-1), AfterValidator(_check_limit)]
Temperature = Annotated[float, Field(ge=0, le=2, description="0, the default, is greedy.")]
TopP = Annotated[float, Field(ge=0, le=1, description="0 leaves the likeliest token.")]
TopK = Annotated[int, Field(ge=-1, le=2**31, description="0 and -1 are off.")]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=10)]
Penalty = Annotated[float, Field(ge=-2, le=2, description="Of tokens that the answer holds already.")]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class BaseRequest(RequestModel):
    """The field that every request has."""

    model: str | None = Field(None, description="One of /v1/models; the first of them when left out.")


class HintedRequest(BaseRequest):
    """Fields of OpenAI's that change nothing here."""

    metadata: dict[str, str] | None = Field(None, description="Taken and not used.")
    user: str | None = Field(None, description="Taken and not used, as the next ones.")
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    parallel_tool_calls: bool | None = None


class GenerationRequest(HintedRequest):
    """The fields that chat and plain completion share."""

    ASKS_NOTHING: ClassVar = {k: v for k, v in RequestModel.ASKS_NOTHING.items() if k not in _BEAMS}

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = Field(
        None, description="Also stream how much of a long prompt is read, as llama.cpp's server does."
    )
    max_tokens: Limit | None = Field(
        None, description=_LIMIT, validation_alias=AliasChoices("max_tokens", "n_predict")
    )
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = Field(
        None, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    num_beams: Annotated[int, Field(ge=1, le=64, description="1 is no beam search.")] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10, description="Of a beam search.")] | None = None
    use_beam_search: bool | None = Field(None, description="vLLM's; false is num_beams 1, true is refused.")
    seed: Seed | None = None
    stop: Texts | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    json_schema: dict[str, Any] | None = Field(None, description="llama.cpp's.")
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    reasoning_effort: str | None = Field(None, description="Taken and not used, as the next fields.")
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None
    guided_decoding_backend: str | None = None
    reasoning_format: str | None = None

    @model_validator(mode="after")
    def _check_fields_together(self) -> GenerationRequest:
        if self.include_usage_in_stream and not self.stream:
            raise field_error("stream_options", "needs stream to be true")
        if self.return_progress and not self.stream:
            raise field_error("return_progress", "needs stream to be true")
        if self.use_beam_search or (self.use_beam_search is False and (self.num_beams or 1) > 1):
            raise field_error("use_beam_search", "leave this out; num_beams (not n) is the number of beams")
        if (self.num_beams or 1) > 1 and (self.n or 1) > 1:
            raise field_error("n", "should be 1 beside num_beams: a beam search gives one answer")
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
    """A request with messages, which may hold pictures and videos."""

    messages: list[AnyMessage] = Field(min_length=1, max_length=MAX_MESSAGES)

    @property
    def images(self) -> list[tuple[str, ImageUrl | VideoUrl]]:
        """Return (field name, address) for each picture and video, in the order of the request."""
        found: list[tuple[str, ImageUrl | VideoUrl]] = []
        for m, message in enumerate(self.messages):
            for p, part in enumerate(message.content if isinstance(message.content, list) else ()):
                place = f"messages.{m}.content.{p}"
                if isinstance(part, ImageUrlPart):
                    found.append((part.field or f"{place}.image_url", part.image_url))
                elif isinstance(part, VideoUrlPart):
                    found.append((f"{place}.video_url", part.video_url))
        return found


class ChatRequest(ConversationRequest, GenerationRequest):
    max_completion_tokens: Limit | None = Field(None, description="Counts before max_tokens.")
    continue_final_message: bool | None = Field(
        None,
        description="The last message is the answer's beginning; add_generation_prompt is false then.",
    )
    add_generation_prompt: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[ToolDescription] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    modalities: list[Literal["text"]] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Taken and not used: a prompt begins with the model's BOS, once."
    )

    @model_validator(mode="after")
    def _check_fields(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error("add_generation_prompt", "is false where continue_final_message is true")
        if self.add_generation_prompt is False and not self.continues:
            message = "is false only where continue_final_message is true: every other answer begins anew"
            raise field_error("add_generation_prompt", message)
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "needs logprobs to be true")
        return self

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        last = self.messages[-1]
        return bool(self.continue_final_message or (isinstance(last, PastAnswer) and last.prefix))

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ExplainRequest(ConversationRequest):
    """Its last message is the assistant's: the answer to explain."""


TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(GenerationRequest):
    prompt: Annotated[
        Annotated[str, Tag("~string")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_ANSWERS), Tag("~texts")]
        | Annotated[list[TokenId], Field(min_length=1), Tag("~ids")]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(max_length=MAX_ANSWERS), Tag("~lists")
        ],
        Discriminator(prompt_kind),
    ] = Field(description="Text as it is, without the model's template; or token ids; or a list of either.")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = Field(None, description="Whether the answer begins with the prompt.")
    max_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None,
        description=f"{_LIMIT} 0 with echo gives the prompt alone.",
        validation_alias=AliasChoices("max_tokens", "n_predict"),
    )
    suffix: Literal[""] | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = Field(None, description="Whether a text begins with the model's BOS.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts: texts, or token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @model_validator(mode="after")
    def _check_choices(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise field_error("best_of", "should be n: every answer is returned; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "should be 1 or more, or -1 for as long as it fits")
        return self


# --- responses ---


class AnswerHead(BaseModel):
    """The fields that every answer and every part of one begins with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


Finish = Literal["stop", "length", "tool_calls"]


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Of the prompt, taken from the prefix cache.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class PromptProgress(BaseModel):
    """How far a prompt is read, in tokens."""

    total: int
    processed: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class LogprobEntry(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[LogprobEntry]
    refusal: None = None


class ToolFunction(BaseModel):
    name: str | None = None
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: ToolFunction


class ToolCallDelta(BaseModel):
    """A part of a call. The first one has the id and the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: ToolFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish | None


class ChatChunk(AnswerHead):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_progress: PromptProgress | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(AnswerHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None
    prompt_progress: PromptProgress | None = None


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
    max_pictures: int | None = Field(
        description="Pictures of a conversation that the model knows from training; null: as many as fit."
    )
    built_in: bool = Field(description="Whether the model is the one that comes with Pumice.")


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
