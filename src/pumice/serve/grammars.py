"""What a request holds its answer to: a JSON Schema, a regular expression, choices, or a function's call."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pumice.engine.constraint import json_rule, quoted
from pumice.errors import CAUSE, InputError
from pumice.jsonl import wrong_json
from pumice.serve.errors import invalid
from pumice.serve.messages import FunctionDescription
from pumice.serve.protocol import ChatRequest, GenerationRequest
from pumice.serve.tools import ToolUse, call_rules

_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)  # or whatever is escaped already


@dataclass(frozen=True)
class HeldTo:
    """A grammar, and what errors call it: the request's field, its name and a code."""

    grammar: str
    field: str
    what: str
    code: str


def held_to(request: GenerationRequest, tools: ToolUse | None = None) -> HeldTo | None:
    """Return what the answer is held to; None if it is free.

    Raises ApiError if the request asks for two things at once, or for what is no schema. `response_format` is
    for answers in text: where a call is required, it has no effect, as in OpenAI's protocol.
    """
    outputs, form = request.structured_outputs, request.response_format
    asked: dict[str, tuple[str, Any]] = {}  # field -> kind and value
    if form is not None and form.type != "text":
        regex = form.type == "regex"
        asked["response_format"] = ("regex", form.value) if regex else ("json", form.schema_or_none)
    if outputs is not None:
        for kind in ("json", "regex", "choice"):
            value = getattr(outputs, "json_" if kind == "json" else kind)
            if value is not None:
                asked[f"structured_outputs.{kind}"] = (kind, value)
        if outputs.json_object:
            asked["structured_outputs.json_object"] = ("json", None)
    if request.json_schema is not None:
        asked["json_schema"] = ("json", request.json_schema)
    for kind in ("json", "regex", "choice"):
        value = getattr(request, f"guided_{kind}")
        if value is not None:
            asked[f"guided_{kind}"] = (kind, value)
    if tools is not None and tools.required:
        for field in asked:
            if field != "response_format":
                message = f"{field} and a tool_choice that requires a call exclude each other; give one"
                raise invalid(field, message)
        return _calls(tools.functions, with_marks=tools.around is not None)
    if len(asked) > 1:
        fields = " and ".join(asked)
        raise invalid([*asked][1], f"{fields} exclude each other; give one")
    return next((_rule(field, *item) for field, item in asked.items()), None)


def tool_schemas(request: ChatRequest, tools: ToolUse) -> list[HeldTo]:
    """Return the schema of each tool, to compile it alone: an error then names the tool.

    Of a function that need not be called only what is no schema at all is wrong.
    """
    return [
        _calls(
            [tool.function],
            f"tools.{number}.function.parameters",
            lenient=not (tools.required and tool.function in tools.functions),
        )
        for number, tool in enumerate(request.tools or ())
    ]


def _calls(functions: Sequence[FunctionDescription], field: str = "tools", **form: bool) -> HeldTo:
    code = "invalid_function_parameters"
    try:
        return HeldTo(call_rules(functions, **form), field, "schema", code)
    except InputError as error:  # too large, too deep, or with settings of the library's
        raise invalid(field, str(error), code) from error


def _rule(field: str, kind: str, value: Any) -> HeldTo:
    if kind == "choice":
        choices = " | ".join(map(quoted, value))
        return HeldTo(f"start: {choices}", field, "choice", "invalid_choice")
    if kind == "regex":
        # A slash ends the pattern in a grammar, and a line its rule.
        pattern = _SLASH.sub(lambda match: {"/": "\\/", "\n": "\\n"}.get(match[0], match[0]), value)
        return HeldTo(f"start: /{pattern}/", field, "regular expression", "invalid_regex")
    try:
        with wrong_json(f"{field} is no JSON Schema ({CAUSE})"):
            schema = json.loads(value) if isinstance(value, str) else value
        return HeldTo(f"start: {json_rule(schema)}", field, "JSON schema", "invalid_json_schema")
    except InputError as error:
        raise invalid(field, str(error), "invalid_json_schema") from error
