"""The operations of the server, and the OpenAPI document of them, /openapi.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pumice.serve import anthropic, ollama, protocol
from pumice.serve.boxes import BoxesBody, BoxesRequest
from pumice.serve.responses import ResponsesRequest
from pumice.serve.responses_form import ResponsesAnswer, ResponsesEvent

_SCHEMAS = "#/components/schemas/"
# Class in `protocol` -> name in the document. Clients generate code from the document, so its names stay.
PUBLISHED_NAMES = {
    "ImageUrlPart": "ImagePart",
    "ChatMessage": "Message",
    "JsonSchemaFormat": "JsonSchema",
    "LogprobEntry": "TokenLogprob",
    "ExplanationBody": "Explanation",
    "BoxesBody": "Boxes",
}
_ERRORS = {
    "400": "Something in the request is wrong; `param` names the field.",
    "401": "A key is needed, or this one is not known.",
    "404": "There is no such model.",
    "408": "The request took too long to arrive.",
    "413": "The request is too large.",
    "415": "The request is not JSON.",
    "421": "The server does not answer to this host name.",
    "429": "Too many requests are waiting; see Retry-After.",
    "500": "The server failed; its log has the trace under the request's id.",
    "503": "The server is about to stop; see Retry-After.",
    "504": "The answer took too long.",
}
_GET = ("401", "421", "500")


@dataclass(frozen=True)
class Operation:
    """One address of the server: what it takes and what it gives.

    request: None for a GET. response: None for plain text. event: of an answer that can be streamed, as
    server-sent events or, if `lines`, as lines of JSON.
    """

    name: str
    path: str
    summary: str
    response: type[BaseModel] | None
    request: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    error: type[BaseModel] = protocol.ErrorBody
    lines: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the operation as OpenAPI writes it."""
        described: dict[str, Any] = {"operationId": self.name, "summary": self.summary}
        if self.request is None:
            statuses: tuple[str, ...] = (*_GET, "404") if "{" in self.path else _GET
            answer = _content(self.summary, self.response)
        else:
            statuses = tuple(_ERRORS)
            answer = _content("The answer.", self.response)
            described["requestBody"] = {"required": True, **_content(None, self.request)}
        if self.event is not None:
            form = "lines of JSON" if self.lines else "server-sent events"
            answer["description"] = f"The answer; with `stream`, {form}."
            fields = {"event": {"type": "string"}, "data": {"type": "string"}}
            each = {"type": "string"} if self.lines else {"type": "object", "properties": fields}
            events = {"schema": each, "x-event": _SCHEMAS + _published(self.event)}
            answer["content"]["application/x-ndjson" if self.lines else "text/event-stream"] = events
        errors = {status: _content(_ERRORS[status], self.error) for status in statuses}
        return {**described, "responses": {"200": answer, **errors}}


OPERATIONS = (
    Operation(
        "chat", "/v1/chat/completions", "Answer a conversation about pictures",
        protocol.ChatCompletion, protocol.ChatRequest, protocol.ChatChunk,
    ),
    Operation(
        "complete", "/v1/completions", "Continue a text",
        protocol.Completion, protocol.CompletionRequest, protocol.Completion,
    ),
    Operation(
        "respond", "/v1/responses", "Answer a conversation, in OpenAI's newer form",
        ResponsesAnswer, ResponsesRequest, ResponsesEvent,
    ),
    Operation(
        "message", "/v1/messages", "Answer a conversation, in Anthropic's form",
        anthropic.AnthropicAnswer, anthropic.AnthropicRequest, anthropic.AnthropicEvent,
        anthropic.AnthropicError,
    ),
    Operation(
        "ollamaChat", "/api/chat", "Answer a conversation, in Ollama's form",
        ollama.OllamaAnswer, ollama.OllamaChatRequest, ollama.OllamaAnswer, ollama.OllamaError, lines=True,
    ),
    Operation(
        "ollamaGenerate", "/api/generate", "Answer a question, in Ollama's form",
        ollama.OllamaAnswer, ollama.OllamaGenerateRequest, ollama.OllamaAnswer, ollama.OllamaError,
        lines=True,
    ),
    Operation(
        "ollamaShow", "/api/show", "The model, in Ollama's form",
        ollama.OllamaShow, ollama.OllamaShowRequest, error=ollama.OllamaError,
    ),
    Operation(
        "ollamaModels", "/api/tags", "The models here, in Ollama's form",
        ollama.OllamaModels, error=ollama.OllamaError,
    ),
    Operation(
        "ollamaVersion", "/api/version", "The server's version", ollama.OllamaVersion,
        error=ollama.OllamaError,
    ),
    Operation(
        "explain", "/explain", "Where an answer's words looked",
        protocol.ExplanationBody, protocol.ExplainRequest,
    ),
    Operation(
        "boxes", "/boxes", "The boxes that an answer holds", BoxesBody, BoxesRequest
    ),
    Operation("models", "/v1/models", "The models here", protocol.ModelList),
    Operation("model", "/v1/models/{name}", "One of them", protocol.ModelCard),
    Operation("health", "/health", "Whether the server answers", protocol.Health),
    Operation("metrics", "/metrics", "Counts and times for Prometheus", None),
)  # fmt: skip


def document(version: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of this version of the server."""
    paths = {
        operation.path: {"get" if operation.request is None else "post": operation.describe()}
        for operation in OPERATIONS
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    health = paths["/health"]["get"]
    health["security"] = []
    health["responses"]["503"] = _content("The server drains.", protocol.Health)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pumice",
            "version": version,
            "description": "Questions about pictures, in the protocols of OpenAI, Anthropic and Ollama.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _schemas() -> dict[str, Any]:
    """Return the schemas of all models under their published names: as key, as title and in every $ref."""
    requests = [operation.request for operation in OPERATIONS if operation.request is not None]
    responses: list[type[BaseModel]] = [operation.error for operation in OPERATIONS]
    responses += [model for o in OPERATIONS for model in (o.response, o.event) if model is not None]
    models: list[tuple[type[BaseModel], Literal["validation", "serialization"]]]
    models = [(model, "validation") for model in requests]
    models += [(model, "serialization") for model in dict.fromkeys(responses)]
    _, schemas = models_json_schema(models, ref_template=_SCHEMAS + "{model}")
    text = json.dumps(schemas["$defs"])
    for class_name, name in PUBLISHED_NAMES.items():
        text = text.replace(f'"{_SCHEMAS}{class_name}"', f'"{_SCHEMAS}{name}"')
    names = {class_name: PUBLISHED_NAMES.get(class_name, class_name) for class_name in schemas["$defs"]}
    return {names[key]: {**schema, "title": names[key]} for key, schema in json.loads(text).items()}


def _published(model: type[BaseModel]) -> str:
    return PUBLISHED_NAMES.get(model.__name__, model.__name__)


def _content(description: str | None, model: type[BaseModel] | None) -> dict[str, Any]:
    """Return a body as OpenAPI writes it: JSON of this model, or plain text."""
    if model is None:
        content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": {"$ref": _SCHEMAS + _published(model)}}}
    return {"content": content} if description is None else {"description": description, "content": content}
