"""The published description of the protocol, /openapi.json, generated from `protocol`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pumice.serve import protocol

_SCHEMAS = "#/components/schemas/"
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
_POST = ("400", "401", "404", "408", "413", "415", "421", "429", "500", "503", "504")
_GET = ("401", "421", "500")


def document(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    asked: list[type[BaseModel]] = [
        protocol.ChatRequest,
        protocol.CompletionRequest,
        protocol.ExplainRequest,
    ]
    told: list[type[BaseModel]] = [
        protocol.ChatCompletion,
        protocol.ChatChunk,
        protocol.Completion,
        protocol.Explanation,
        protocol.ModelList,
        protocol.ModelCard,
        protocol.Health,
        protocol.ErrorBody,
    ]
    models: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in asked]
    models += [(model, "serialization") for model in told]
    _, schemas = models_json_schema(models, ref_template=_SCHEMAS + "{model}")
    paths = {
        "/v1/chat/completions": {
            "post": _ask(
                "chat", "Answer a conversation about pictures", "ChatRequest", "ChatCompletion", "ChatChunk"
            )
        },
        "/v1/completions": {
            "post": _ask("complete", "Continue a text", "CompletionRequest", "Completion", "Completion")
        },
        "/explain": {
            "post": _ask("explain", "Where an answer's words looked", "ExplainRequest", "Explanation")
        },
        "/v1/models": {"get": _look("models", "The models here", "ModelList")},
        "/v1/models/{name}": {
            "get": _look("model", "One of them", "ModelCard", "404")
            | {
                "parameters": [
                    {
                        "name": "name",
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string", "minLength": 1},
                    }
                ]
            }
        },
        "/health": {"get": _look("health", "Whether the server answers", "Health", security=False)},
        "/metrics": {
            "get": _look("metrics", "Counts and times for Prometheus", None),
        },
    }
    paths["/health"]["get"]["responses"]["503"] = _json(
        "The server drains or its upstream is away.", "Health"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pumice",
            "version": version,
            "description": "Questions about pictures, in OpenAI's protocol.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            **_components(schemas),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _components(schemas: dict[str, Any]) -> dict[str, Any]:
    return {"schemas": schemas["$defs"]}


def _ask(name: str, summary: str, body: str, whole: str, piece: str | None = None) -> dict[str, Any]:
    """piece: the schema of an event, where the answer can be streamed."""
    answer = _json("The answer.", whole)
    if piece is not None:
        answer["description"] = "The answer; with `stream`, server-sent events that end with `data: [DONE]`."
        answer["content"]["text/event-stream"] = {"schema": {"type": "string"}, "x-event": _SCHEMAS + piece}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, **_content(body)},
        "responses": {"200": answer} | {status: _json(_ERRORS[status], "ErrorBody") for status in _POST},
    }


def _look(name: str, summary: str, model: str | None, *more: str, security: bool = True) -> dict[str, Any]:
    text = {"description": summary, "content": {"text/plain": {"schema": {"type": "string"}}}}
    found: dict[str, Any] = {"200": _json(summary, model) if model else text}
    found |= {status: _json(_ERRORS[status], "ErrorBody") for status in (*_GET, *more)}
    made: dict[str, Any] = {"operationId": name, "summary": summary, "responses": found}
    return made if security else {**made, "security": []}


def _json(description: str, model: str) -> dict[str, Any]:
    return {"description": description, **_content(model)}


def _content(model: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": _SCHEMAS + model}}}}
