"""Ollama's protocol, /api/chat and /api/generate, as a translation of the chat's; /api/tags and /api/show.

Source: Ollama's API documentation (docs/api.md of its repository).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, Discriminator, Field, Tag

from pumice.config import ModelConfig
from pumice.serve.answers import AnswerForm, AnswerModel, AnswerPiece, join
from pumice.serve.messages import (
    Arguments,
    ImageUrlPart,
    PartList,
    RequestModel,
    TextPart,
    ToolDescription,
    json_kind,
)
from pumice.serve.protocol import (
    MAX_MESSAGES,
    BaseRequest,
    ChatRequest,
    ErrorBody,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    Temperature,
    Texts,
    TopK,
    TopP,
    Usage,
)

# --- requests ---


class EngineOptions(RequestModel):
    """Options that set up Ollama's engine."""

    num_ctx: int | None = Field(
        None, description="Taken and not used, as all to `penalize_newline`: of Ollama's engine."
    )
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    repeat_last_n: int | None = None
    penalize_newline: bool | None = None


class OllamaOptions(EngineOptions):
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repeat_penalty: RepetitionPenalty | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Texts | None = None
    num_predict: int | None = Field(None, ge=-2, description="-1 and -2 are as long as it fits.")

    def chat(self) -> dict[str, Any]:
        """Return the fields of a chat, most of which have the same names."""
        fields = self.model_dump(exclude={"num_predict", *EngineOptions.model_fields})
        limit = self.num_predict
        return {**fields, "max_tokens": None if limit is None else max(limit, -1) or 1}


Form = Annotated[
    Annotated[Literal["json", ""], Tag("~string")] | Annotated[dict[str, Any], Tag("~object")],
    Discriminator(json_kind),
]


class OllamaRequest(BaseRequest):
    """The fields that chat and generate share."""

    VERBATIM: ClassVar[frozenset[str]] = RequestModel.VERBATIM | {"format"}

    model: str
    stream: bool | None = Field(None, description="True when left out.")
    format: Form | None = Field(None, description="json, or a JSON Schema.")
    options: OllamaOptions | None = None
    think: Literal[False] | None = None
    keep_alive: Any = Field(None, description="Taken and not used.")

    def _chat(self, messages: list[Any], **more: Any) -> ChatRequest:
        """Return the request as one for a chat."""
        form: dict[str, Any] | None = None
        if isinstance(self.format, dict):
            form = {"type": "json_schema", "json_schema": {"schema": self.format}}
        elif self.format:
            form = {"type": "json_object"}
        asked = {**(self.options or OllamaOptions()).chat(), "response_format": form, **more}
        return ChatRequest(model=self.model, messages=messages, stream=self.stream is not False, **asked)


class OllamaFunction(RequestModel):
    name: str
    arguments: Arguments = "{}"
    index: int | None = Field(None, description="Taken and not used.")


class OllamaPastCall(RequestModel):
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaMessage(RequestModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: list[Annotated[str, Field(min_length=1)]] | None = Field(None, description="Files in base64.")
    tool_calls: list[OllamaPastCall] | None = None
    tool_name: str | None = Field(None, description="Taken and not used, as the next one.")
    thinking: str | None = None
    tool_call_id: str | None = None


class OllamaChatRequest(OllamaRequest):
    messages: list[OllamaMessage] = Field(default_factory=list, max_length=MAX_MESSAGES)
    tools: list[ToolDescription] | None = Field(None, max_length=128)

    def chat(self) -> ChatRequest:
        """Return the request as one for a chat. Results of tools belong to the calls before, in order."""
        messages: list[Any] = []
        calls: deque[str] = deque()  # of the last answer, without a result so far
        for number, message in enumerate(self.messages):
            content = _content(message.content, message.images, f"messages.{number}.images")
            turn: dict[str, Any] = {"role": message.role, "content": content}
            if message.role == "assistant":
                called = [
                    {
                        "id": call.id or f"call_{number}_{place}",
                        "function": call.function.model_dump(exclude={"index"}),
                    }
                    for place, call in enumerate(message.tool_calls or ())
                ]
                calls = deque(str(call["id"]) for call in called)
                turn["tool_calls"] = called
            elif message.role == "tool":
                turn["tool_call_id"] = message.tool_call_id or (calls.popleft() if calls else "")
            messages.append(turn)
        return self._chat(messages, tools=self.tools)

    @property
    def loads_only(self) -> bool:
        """Whether the request asks nothing: Ollama loads the model then."""
        return not self.messages


class OllamaGenerateRequest(OllamaRequest):
    prompt: str = ""
    images: list[Annotated[str, Field(min_length=1)]] | None = Field(None, description="Files in base64.")
    system: str | None = None
    raw: Literal[False] | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: list[int] | None = Field(None, max_length=0)

    def chat(self) -> ChatRequest:
        """Return the request as one for a chat."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": _content(self.prompt, self.images, "images")}
        return self._chat([*system, question])

    @property
    def loads_only(self) -> bool:
        """Whether the request asks nothing: Ollama loads the model then."""
        return not self.prompt and not self.images


def _content(text: str, images: Sequence[str] | None, field: str) -> str | PartList:
    """Return a message's content, pictures first."""
    if not images:
        return text
    parts: PartList = []
    for number, image in enumerate(images):
        url = image if image.startswith("data:") else f"data:image/png;base64,{image}"
        parts.append(ImageUrlPart.named(f"{field}.{number}", url))
    return [*parts, TextPart(type="text", text=text)] if text else parts


class OllamaShowRequest(BaseRequest):
    # `name` is the older name of the field.
    model: str | None = Field(None, validation_alias=AliasChoices("model", "name"))
    verbose: bool | None = Field(None, description="Taken and not used.")


# --- answers ---


class OllamaCalledFunction(AnswerModel):
    name: str
    arguments: dict[str, Any]


class OllamaCall(AnswerModel):
    function: OllamaCalledFunction


class OllamaAnswerMessage(AnswerModel):
    role: Literal["assistant"] = "assistant"
    content: str
    tool_calls: list[OllamaCall] | None = None


class OllamaAnswer(AnswerModel):
    """A piece of an answer, or all of it: `message` of a chat, `response` of generate."""

    model: str
    created_at: str
    message: OllamaAnswerMessage | None = None
    response: str | None = None
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = Field(None, description="Nanoseconds, as of the others.")
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaError(AnswerModel):
    error: str


class OllamaForm(AnswerForm):
    """Writes the answer to a request, whole or line by line. is_chat: of /api/chat, else of /api/generate."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, is_chat: bool) -> None:
        self._model, self._is_chat = model, is_chat
        self._started = time.perf_counter()
        self._first: float | None = None  # when the first piece came; a whole answer does not tell
        self._call = AnswerPiece()  # so far, without text that is streamed already

    def response(self, answers: Sequence[AnswerPiece], usage: Usage) -> OllamaAnswer:
        self._call = answers[0]
        return self._end(answers[0].text, usage)

    def begin(self, _: Usage) -> bytes:
        self._first = time.perf_counter()
        return b""

    def piece(self, piece: AnswerPiece) -> bytes:
        self._call = join([self._call, replace(piece, text="", tokens=())])
        return _line(self._answer(piece.text, done=False)) if piece.text else b""

    def end(self, usage: Usage) -> bytes:
        return _line(self._end("", usage))

    def loaded(self) -> OllamaAnswer:
        """Return the answer to a request that asks nothing."""
        return self._answer("", done=True, done_reason="load")

    def error(self, error: ErrorBody) -> bytes:
        return _line(OllamaError(error=error.error.message))

    def _end(self, text: str, usage: Usage) -> OllamaAnswer:
        now, durations = time.perf_counter(), {}
        if self._first is not None:
            durations["prompt_eval_duration"] = _nanoseconds(self._first - self._started)
            durations["eval_duration"] = _nanoseconds(now - self._first)
        return self._answer(
            text,
            done=True,
            done_reason="length" if self._call.finish == "length" else "stop",
            total_duration=_nanoseconds(now - self._started),
            load_duration=0,
            prompt_eval_count=usage.prompt_tokens,
            eval_count=usage.completion_tokens,
            **durations,
        )

    def _answer(self, text: str, **more: Any) -> OllamaAnswer:
        said: dict[str, Any] = {"response": text}
        if self._is_chat:
            message = OllamaAnswerMessage(content=text)
            if self._call.finish == "tool_calls":  # its arguments are an object, so they come last
                values = json.loads(self._call.arguments)
                function = OllamaCalledFunction(name=self._call.name, arguments=values)
                message.tool_calls = [OllamaCall(function=function)]
            said = {"message": message}
        return OllamaAnswer(model=self._model, created_at=_now(), **said, **more)


def _line(answer: BaseModel) -> bytes:
    return answer.model_dump_json(exclude_none=True).encode() + b"\n"


def _nanoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


# --- models ---


class OllamaDetails(AnswerModel):
    parent_model: str = ""
    format: str = "pumice"
    family: str = "llava"
    families: list[str] = Field(default_factory=lambda: ["llava"])
    parameter_size: str
    quantization_level: str


class OllamaModel(AnswerModel):
    name: str
    model: str
    modified_at: str
    size: int = Field(description="Bytes of its weights in memory.")
    digest: str
    details: OllamaDetails


class OllamaModels(AnswerModel):
    models: list[OllamaModel]


class OllamaShow(AnswerModel):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(AnswerModel):
    version: str


class OllamaCard:
    """Describes the model as Ollama does. size: bytes of its weights in memory."""

    def __init__(self, names: Sequence[str], config: ModelConfig, size: int, parameters: int) -> None:
        self._names, self._config, self._opened = names, config, _now()
        self._size, self._parameters = size, parameters
        self._digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
        count = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
        self._details = OllamaDetails(parameter_size=count, quantization_level="")

    def models(self) -> OllamaModels:
        return OllamaModels(
            models=[
                OllamaModel(
                    name=name,
                    model=name,
                    modified_at=self._opened,
                    size=self._size,
                    digest=self._digest,
                    details=self._details,
                )
                for name in self._names
            ]
        )

    def show(self) -> OllamaShow:
        sees, chat = self._config.vision.kind != "none", self._config.chat
        knows_tools = chat is not None and chat.tools is not None
        return OllamaShow(
            modelfile="",
            parameters="",
            template="{{ .Prompt }}",
            details=self._details,
            model_info={
                "general.architecture": "llava",
                "general.parameter_count": self._parameters,
                "llava.context_length": self._config.decoder.context,
            },
            capabilities=["completion", *["vision"] * sees, *["tools"] * knows_tools],
            modified_at=self._opened,
        )
