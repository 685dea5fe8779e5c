"""The OpenAPI document of the server, /openapi.json, generated from the classes of `protocol`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pumice.serve import protocol

_SCHEMAS = "#/components/schemas/"
# Class in `protocol` -> name in the document. Clients generate code from the document, so its names stay.
PUBLISHED_NAMES = {
    "ImageUrlPart": "ImagePart",
    "ChatMessage": "Message",
    "JsonSchemaFormat": "JsonSchema",
    "LogprobEntry": "TokenLogprob",
    "ExplanationBody": "Explanation",
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
_POST = ("400", "401", "404", "408", "413", "415", "421", "429", "500", "503", "504")
_GET = ("401", "421", "500")


def document(version: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of this version of the server."""
    request_models: list[type[BaseModel]] = [
        protocol.ChatRequest,
        protocol.CompletionRequest,
        protocol.ExplainRequest,
    ]
    response_models: list[type[BaseModel]] = [
        protocol.ChatCompletion,
        protocol.ChatChunk,
        protocol.Completion,
        protocol.ExplanationBody,
        protocol.ModelList,
        protocol.ModelCard,
        protocol.Health,
        protocol.ErrorBody,
    ]
    models: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in request_models]
    models += [(model, "serialization") for model in response_models]
    _, schemas = models_json_schema(models, ref_template=_SCHEMAS + "{model}")
    paths = {
        "/v1/chat/completions": {
            "post": _post(
                "chat", "Answer a conversation about pictures", "ChatRequest", "ChatCompletion", "ChatChunk"
            )
        },
        "/v1/completions": {
            "post": _post("complete", "Continue a text", "CompletionRequest", "Completion", "Completion")
        },
        "/explain": {
            "post": _post("explain", "Where an answer's words looked", "ExplainRequest", "Explanation")
        },
        "/v1/models": {"get": _get("models", "The models here", "ModelList")},
        "/v1/models/{name}": {
            "get": _get("model", "One of them", "ModelCard", "404")
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
        "/health": {"get": _get("health", "Whether the server answers", "Health", security=False)},
        "/metrics": {
            "get": _get("metrics", "Counts and times for Prometheus", None),
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
    """Return the schemas under their published names: as key, as title and in every $ref."""
    published = {}
    for class_name, schema in schemas["$defs"].items():
        name = PUBLISHED_NAMES.get(class_name, class_name)
        published[name] = {**_publish_refs(schema), "title": name}
    return {"schemas": published}


def _publish_refs(value: Any) -> Any:
    if isinstance(value, list):
        return [_publish_refs(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _publish_refs(item) for key, item in value.items()}
    if isinstance(ref := value.get("$ref"), str):
        class_name = ref.removeprefix(_SCHEMAS)
        renamed["$ref"] = _SCHEMAS + PUBLISHED_NAMES.get(class_name, class_name)
    return renamed


def _post(name: str, summary: str, request: str, response: str, event: str | None = None) -> dict[str, Any]:
    """Describe a POST operation by its schemas. event: that of an event, if the answer can be streamed."""
    answer = _json("The answer.", response)
    if event is not None:
        answer["description"] = "The answer; with `stream`, server-sent events that end with `data: [DONE]`."
        answer["content"]["text/event-stream"] = {"schema": {"type": "string"}, "x-event": _SCHEMAS + event}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, **_content(request)},
        "responses": {"200": answer} | {status: _json(_ERRORS[status], "ErrorBody") for status in _POST},
    }


def _get(name: str, summary: str, model: str | None, *statuses: str, security: bool = True) -> dict[str, Any]:
    plain_text = {"description": summary, "content": {"text/plain": {"schema": {"type": "string"}}}}
    responses: dict[str, Any] = {"200": _json(summary, model) if model else plain_text}
    responses |= {status: _json(_ERRORS[status], "ErrorBody") for status in (*_GET, *statuses)}
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    return operation if security else {**operation, "security": []}


def _json(description: str, model: str) -> dict[str, Any]:
    return {"description": description, **_content(model)}


def _content(model: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": _SCHEMAS + model}}}}
