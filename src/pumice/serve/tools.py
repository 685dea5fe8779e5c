"""Tools: which of them an answer must call, how the model is told, and how a call is read from its text.

A call is written as `{"name":"...","arguments":{...}}`. Where only one function can be called, its arguments
are the answer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace

from pumice.engine.constraint import json_rule, quoted
from pumice.serve.answers import AnswerPiece
from pumice.serve.errors import ApiError
from pumice.serve.messages import CalledFunction, FunctionDescription, PastAnswer, ToolMessage
from pumice.serve.protocol import ChatRequest

_HEAD = re.compile(r'\{"name":"([^"]*)","arguments":')
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def check_tools(request: ChatRequest, field: str | None = None) -> None:
    """Raise ApiError for two tools of one name, and for a tool's message without a call.

    field: where a request of another protocol has the messages.
    """
    names: set[str] = set()
    for number, tool in enumerate(request.tools or ()):
        name = tool.function.name
        if name in names:
            raise ApiError(
                400,
                f"two tools are called {name!r}; give each a name of its own",
                param=f"tools.{number}.function.name",
                code="duplicate_tool",
            )
        names.add(name)
    calls: set[str | None] = set()
    for number, message in enumerate(request.messages):
        if isinstance(message, PastAnswer):
            calls |= {call.id for call in message.tool_calls or ()}
        elif isinstance(message, ToolMessage) and message.tool_call_id not in calls:
            raise ApiError(
                400,
                "messages with role 'tool' must be a response to a preceding message with 'tool_calls': "
                f"there is no call {message.tool_call_id[:100]!r}",
                param=field or f"messages.{number}.tool_call_id",
                code="unknown_tool_call",
            )


def functions_to_call(request: ChatRequest) -> list[FunctionDescription]:
    """Return the functions one of which the answer has to call. With none, the answer is text."""
    functions = [tool.function for tool in request.tools or ()]
    choice = request.tool_choice
    if choice is None or choice in ("auto", "none"):
        return []
    if not functions:
        raise ApiError(
            400,
            "tool_choice needs tools; give some, or leave it out",
            param="tool_choice",
            code="missing_tools",
        )
    if isinstance(choice, str):
        return functions
    name = choice.function.name
    chosen = [function for function in functions if function.name == name]
    if not chosen:
        known = ", ".join(repr(function.name) for function in functions)
        raise ApiError(
            400,
            f"tool_choice names {name[:64]!r}, the tools are {known}",
            param="tool_choice",
            code="unknown_tool",
        )
    return chosen


def call_rules(functions: Sequence[FunctionDescription], *, lenient: bool = False) -> str:
    """Return the grammar of a call of one of these functions; lenient as in `json_rule`."""
    if len(functions) == 1:
        return f"start: {json_rule(functions[0].parameters or _NO_PARAMETERS, lenient=lenient)}"
    starts, rules = [], []
    for number, function in enumerate(functions):
        head = quoted(f'{{"name":"{function.name}","arguments":')
        starts.append(f'{head} f{number} "}}"')
        rules.append(f"f{number}: {json_rule(function.parameters or _NO_PARAMETERS, lenient=lenient)}")
    return "\n".join([f"start: {' | '.join(starts)}", *rules])


def instruction(functions: Sequence[FunctionDescription]) -> str:
    """Return what the model is told of the functions that it must call."""
    lines = [
        json.dumps(function.model_dump(include={"name", "description", "parameters"}, exclude_none=True))
        for function in functions
    ]
    if len(functions) == 1:
        request = "Call this function. Answer only with its arguments, as a JSON object."
    else:
        call = '{"name": <function>, "arguments": <object>}'
        request = f"Call one of these functions. Answer only with JSON: {call}"
    return "\n".join([request, *lines])


def call_text(call: CalledFunction) -> str:
    """Return a call of before as the model wrote it."""
    arguments = json.dumps(json.loads(call.arguments), separators=(",", ":"), ensure_ascii=False)
    return f'{{"name":{json.dumps(call.name)},"arguments":{arguments}}}'


class CallReader:
    """Turns an answer that is a call of one of these functions into name and arguments, piece by piece."""

    def __init__(self, functions: Sequence[FunctionDescription]) -> None:
        self._id = f"call_{secrets.token_hex(12)}"
        self._only = functions[0].name if len(functions) == 1 else None
        self._held = ""  # text that is not told yet: the beginning, then what may be the call's last brace
        self._arguments: str | None = None  # so far; None before the call's name is told

    def __call__(self, piece: AnswerPiece) -> AnswerPiece:
        # 1. Wait for the name.
        text, name = self._held + piece.text, ""
        if self._arguments is None:
            if self._only is not None:
                name = self._only
            elif head := _HEAD.match(text):
                name, text = head[1], text[head.end() :]
            else:
                self._held = text
                return replace(piece, text="")
            self._arguments = ""
        # 2. All that follows is arguments. If the answer has the name, a last brace ends the call.
        arguments, self._held = (text, "") if self._only is not None else (text[:-1], text[-1:])
        self._arguments += arguments
        finish = piece.finish
        if finish is not None and _is_object(self._arguments):
            finish = "tool_calls"
        elif finish is not None:  # it is cut off
            arguments += self._held
        return replace(piece, text="", call_id=self._id, name=name, arguments=arguments, finish=finish)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
