"""What goes wrong with a request, in OpenAI's shape: a status, a sentence, the field's name.

Knows pydantic's findings and InputError. Does not know HTTP servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

# What is better said of a field than pydantic says it.
REMEDIES = {
    "n": "this server gives one answer per request; leave n out or set it to 1",
    "best_of": "this server gives one answer per request; leave best_of out or set it to 1",
    "frequency_penalty": "frequency_penalty is not supported; leave it out, or use repetition_penalty",
    "presence_penalty": "presence_penalty is not supported; leave it out, or use repetition_penalty",
    "logit_bias": "logit_bias is not supported; leave it out",
    "modalities": "this server answers in text only; leave modalities out",
    "echo": "echo is not supported; leave it out",
    "suffix": "suffix is not supported; leave it out",
    "tools": "this server calls no tools; leave tools out",
    "functions": "this server calls no functions; leave functions out",
    "audio": "this server neither hears nor speaks; leave audio out",
}
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error. param: the field, as in "messages.0.content"; code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(error: ValidationError) -> ApiError:
    """The first thing that pydantic found wrong with a body."""
    found = error.errors(include_url=False, include_context=False)[0]
    # Names of alternatives begin with ~ in `protocol`; they are no fields.
    path = [str(step) for step in found["loc"] if not str(step).startswith("~")]
    param = ".".join(path) or None
    kind, said = found["type"], found["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {said.removeprefix('Invalid JSON: ')}", code=kind)
    if path and path[0] in REMEDIES and len(path) == 1:
        return ApiError(400, REMEDIES[path[0]], param=param, code="unsupported_value")
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field '{param}'; leave it out", param=param, code="unknown_field")
    if kind == "missing":
        return ApiError(400, f"the field '{param}' is missing", param=param, code="missing_field")
    where = f"'{param}': " if param else "the body: "
    said = said.removeprefix("Value error, ")
    return ApiError(400, f"{where}{said[:1].lower()}{said[1:]}", param=param, code="invalid_value")


def field(*steps: str | int) -> str:
    """A field's name as `param` has it."""
    return ".".join(map(str, steps))


def no_model(asked: str, known: Sequence[str]) -> ApiError:
    names = ", ".join(map(repr, known))
    return ApiError(
        404, f"there is no model {asked!r} here; use {names}", param="model", code="model_not_found"
    )
