"""Errors of requests in OpenAI's form: a status, a sentence and the field's name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pydantic import BaseModel, ValidationError

from pumice.errors import ContextOverflow, cut, near, shorten
from pumice.serve.answers import ModelResponse
from pumice.serve.anthropic import AnthropicError
from pumice.serve.ollama import OllamaError
from pumice.serve.protocol import ErrorBody, ErrorDetail

# Field -> a clearer message than pydantic's.
REMEDIES = {
    "logit_bias": "logit_bias is not supported; leave it out",
    "modalities": "this server answers in text only; leave modalities out",
    "suffix": "suffix is not supported; leave it out",
    "functions": "functions are an older form of tools; use tools",
    "previous_response_id": "this server continues no earlier response; send the whole conversation as input",
    "conversation": "this server keeps no conversations; send the whole conversation as input",
    "audio": "this server neither hears nor speaks; leave audio out",
}
# Class of a request -> the kinds of parts that a content may have there.
TEXT_OR_IMAGE = "'text', 'image_url' or 'video_url'"
PARTS = {
    "ResponsesRequest": "'input_text', 'input_image' or 'output_text'",
    "AnthropicRequest": "'text', 'image', 'tool_use' or 'tool_result'",
}
NEAR = 0.73  # how much alike two names are of which one is taken for the other: "images" is not "messages"
# Path -> fields of a chat, and what they are called there: what is checked as a chat's names those.
FIELD_NAMES = {
    "/v1/responses": {"response_format": "text.format", ".function.": "."},
    "/v1/messages": {".function.parameters": ".input_schema", ".function.": "."},
}
ITEMS = "'message', 'function_call', 'function_call_output', 'item_reference' or 'reasoning'"
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


LONGEST_MESSAGE = 1000  # characters of an error, what the client sent included


class ApiError(Exception):
    """An error response. param: the field, such as "messages.0.content". code: the reason, for programs.

    The message is shortened: a client's own words may be in it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = cut(message, LONGEST_MESSAGE)
        self.param = param
        super().__init__(self.message)
        self.code = "invalid_value" if code is None and status == 400 else code
        self.headers = dict(headers or {})

    def body(self) -> ErrorBody:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return ErrorBody(error=ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code))

    def response(self, path: str) -> ModelResponse:
        """Return the error in the form of the protocol that the path belongs to."""
        for field, name in FIELD_NAMES.get(path, {}).items():
            self.param = self.param and self.param.replace(field, name)
        body: BaseModel = self.body()
        if path.startswith("/api/"):
            body = OllamaError(error=self.message)
        elif path.startswith("/v1/messages"):
            body = AnthropicError.of(self.body().error)
        return ModelResponse(body, self.status, self.headers)


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """Return the error of a request whose field `param` is wrong; None: no field, but the request itself."""
    return ApiError(400, message, param=param, code=code)


def busy(what: str, seconds: int, code: str = "queue_full", **headers: str) -> ApiError:
    """Return the error of a server that has too much to do. seconds: until it may have time."""
    return ApiError(
        429, f"{what}; ask again soon", code=code, headers={"Retry-After": str(seconds), **headers}
    )


def is_stopping() -> ApiError:
    return ApiError(
        503,
        "the server is about to stop; ask again soon",
        code="draining",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {seconds:g} s; ask for a shorter one", code="timeout")


def validation_error(error: ValidationError, known: Collection[str] = ()) -> ApiError:
    """Return the first problem that pydantic reports of a body as an ApiError.

    known: the request's fields, of which an unknown one may mean one.
    """
    problem = error.errors(include_url=False)[0]
    # Steps that begin with ~ are the tags of unions in `protocol`, not fields.
    # An unknown field's name is cut before it is compared with others, which takes 40 times its memory.
    path = [cut(str(step)) for step in problem["loc"] if not str(step).startswith("~")]
    code, message = problem["type"], problem["msg"]
    content = f"text, or a list of parts whose type is {PARTS.get(error.title, TEXT_OR_IMAGE)}"
    if error.title == "OllamaChatRequest":
        content = "text; pictures belong in 'images'"
    context = problem.get("ctx", {})
    if "field" in context:  # of `field_error`
        path.append(context["field"])
    param = cut(".".join(path)) or None
    if path and path[0] in REMEDIES and len(path) == 1:
        return invalid(param, REMEDIES[path[0]], "unsupported_value")
    if context.get("expected") in ("False", "''") or context.get("max_length") == 0:  # only absent is right
        return invalid(param, f"{param} is not supported; leave it out", "unsupported_value")
    if code == "extra_forbidden":
        meant = near(path[0], known, NEAR) if len(path) == 1 else None
        remedy = f"did you mean '{meant}'?" if meant else "leave it out"
        return invalid(param, f"unknown field '{param}'; {remedy}", "unknown_field")
    if code == "missing":
        hint = f" or null; give {content}" if path[-1] == "content" else ""
        return invalid(param, f"the field '{param}' is missing{hint}", "missing_field")
    if code == "literal_error" and path[-1] == "type":
        kind = shorten(problem["input"], 40)
        if path[:1] == ["input"] and len(path) == 3:
            return invalid(param, f"there is no item {kind} here; give {ITEMS}")
        if path[-3:-2] == ["content"]:
            return invalid(param, f"there is no part {kind} here; give {content}")
    if "content" in path[-2:] and code in ("model_type", "string_type", "union_tag_invalid"):
        message = f"give {content}"
    elif code == "model_type":
        message = "input should be an object"
    prefix = f"'{param}': " if param else "the body: "
    message = message.removeprefix("Value error, ").replace(" after validation", "")
    message = message.replace("a valid dictionary", "an object").replace("Dictionary", "Object")
    return invalid(param, f"{prefix}{message[:1].lower()}{message[1:]}")


def context_overflow(error: ContextOverflow, param: str) -> ApiError:
    """Return the error in OpenAI's words, by which client libraries recognise it."""
    return invalid(
        param,
        f"This model's maximum context length is {error.limit} tokens. However, you requested at least "
        f"{error.tokens + 1} tokens ({error.tokens} in the {param}, 1 or more in the completion). "
        f"Please reduce the length of the {param}, or show fewer pictures.",
        "context_length_exceeded",
    )


def unknown_model(model: str, known_models: Sequence[str]) -> ApiError:
    names = ", ".join(map(repr, known_models))
    return ApiError(
        404, f"there is no model {shorten(model)} here; use {names}", param="model", code="model_not_found"
    )
