"""Tools: which of them an answer must call, how the model is told, and how a call is read from its text.

Where the model's template knows functions, a call stands between the marks of that form, in or after a text.
Else an answer that must be a call is nothing else: `{"name":"...","arguments":{...}}`, or only the arguments
where one function can be called.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pumice.engine.constraint import json_rule, quoted
from pumice.jsonl import parse_json
from pumice.serve.answers import AnswerPiece
from pumice.serve.errors import invalid
from pumice.serve.messages import (
    CalledFunction,
    FunctionDescription,
    NamedFunction,
    PastAnswer,
    ToolMessage,
)
from pumice.serve.protocol import ChatRequest
from pumice.templates import CALL, call_text, tools_text

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*(?=\S)')
_OPEN, CLOSE = CALL[0].strip(), CALL[1].strip()
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def check_tools(request: ChatRequest, field: str = "") -> None:
    """Raise ApiError for two tools of one name, and for a tool's message without a call.

    field: where a request of another protocol has the messages.
    """
    names: set[str] = set()
    for number, tool in enumerate(request.tools or ()):
        name = tool.function.name
        if name in names:
            raise invalid(
                f"tools.{number}.function.name",
                f"two tools are called {name!r}; give each a name of its own",
                "duplicate_tool",
            )
        names.add(name)
    calls: set[str | None] = set()
    for number, message in enumerate(request.messages):
        if isinstance(message, PastAnswer):
            calls |= {call.id for call in message.tool_calls or ()}
        elif isinstance(message, ToolMessage) and message.tool_call_id not in calls:
            raise invalid(
                field or f"messages.{number}.tool_call_id",
                "messages with role 'tool' must be a response to a preceding message with 'tool_calls': "
                f"there is no call {message.tool_call_id[:100]!r}",
                "unknown_tool_call",
            )


@dataclass(frozen=True)
class ToolUse:
    """The functions that an answer may call. required: it has to call one of them.

    around: what stands around their descriptions in the model's template; None if it knows no functions.
    """

    functions: tuple[FunctionDescription, ...] = ()
    required: bool = False
    around: tuple[str, str] | None = None

    def __bool__(self) -> bool:
        """Whether the model is told of functions at all."""
        return bool(self.functions) and (self.required or self.around is not None)

    def told(self) -> str:
        """Return what the model is told of them."""
        if not self:
            return ""
        names = {"name", "description", "parameters"}
        described = [function.model_dump(include=names, exclude_none=True) for function in self.functions]
        if self.around is not None:
            tools = [{"type": "function", "function": function} for function in described]
            return tools_text(self.around, tools)
        request = "Call this function. Answer only with its arguments, as a JSON object."
        if len(described) > 1:
            call = '{"name": <function>, "arguments": <object>}'
            request = f"Call one of these functions. Answer only with JSON: {call}"
        return "\n".join([request, *map(json.dumps, described)])

    def reader(self) -> CallReader | TextOrCall:
        """Return what reads such an answer."""
        if self.around is None:
            return CallReader(self.functions)
        return TextOrCall(self.functions)


def tool_use(request: ChatRequest, around: tuple[str, str] | None) -> ToolUse:
    """Return the functions that the answer may call, and whether it has to. around: as of `ToolUse`."""
    functions = {tool.function.name: tool.function for tool in request.tools or ()}
    choice = request.tool_choice
    if choice == "none":
        return ToolUse()
    if choice is None or choice == "auto":
        return ToolUse(tuple(functions.values()), False, around)
    if not functions:
        raise invalid("tool_choice", "tool_choice needs tools; give some, or leave it out", "missing_tools")
    if isinstance(choice, str):
        return ToolUse(tuple(functions.values()), True, around)
    named = [choice] if isinstance(choice, NamedFunction) else choice.allowed_tools.tools
    names = dict.fromkeys(tool.function.name for tool in named)
    if unknown := [name for name in names if name not in functions]:
        known = ", ".join(map(repr, functions))
        raise invalid(
            "tool_choice", f"tool_choice names {unknown[0][:64]!r}, the tools are {known}", "unknown_tool"
        )
    required = isinstance(choice, NamedFunction) or choice.allowed_tools.mode == "required"
    return ToolUse(tuple(functions[name] for name in names), required, around)


def call_rules(
    functions: Sequence[FunctionDescription], *, with_marks: bool = False, lenient: bool = False
) -> str:
    """Return the grammar of a call of one of these functions; lenient as in `json_rule`.

    with_marks: as templates that know functions write it.
    """
    if len(functions) == 1 and not with_marks:
        return f"start: {json_rule(functions[0].parameters or _NO_PARAMETERS, lenient=lenient)}"
    starts, rules = [], []
    for number, function in enumerate(functions):
        if with_marks:
            head, tail = f'{CALL[0]}{{"name": "{function.name}", "arguments": ', f"}}{CALL[1]}"
        else:
            head, tail = f'{{"name":"{function.name}","arguments":', "}"
        starts.append(f"{quoted(head)} f{number} {quoted(tail)}")
        rules.append(f"f{number}: {json_rule(function.parameters or _NO_PARAMETERS, lenient=lenient)}")
    return "\n".join([f"start: {' | '.join(starts)}", *rules])


def past_call(call: CalledFunction, around: tuple[str, str] | None) -> str:
    """Return a call of before as the model wrote it. around: as of `ToolUse`."""
    arguments = json.loads(call.arguments)
    if around is not None:
        return call_text(call.name, arguments)
    return json.dumps({"name": call.name, "arguments": arguments}, separators=(",", ":"), ensure_ascii=False)


class CallReader:
    """Turns an answer that is a call of one of these functions into name and arguments, piece by piece.

    marked: the name is always written. An answer that turns out to be no call of theirs stays text.
    """

    def __init__(self, functions: Sequence[FunctionDescription], *, marked: bool = False) -> None:
        self._id = f"call_{secrets.token_hex(12)}"
        self._names = {function.name for function in functions}
        self._only = functions[0].name if len(functions) == 1 and not marked else None
        self._held = ""  # text that is not told yet: the beginning, then what may be the call's end
        self._arguments: str | None = None  # so far; None before the call's name is told

    @property
    def begun(self) -> bool:
        """Whether the name of a function was read."""
        return self._arguments is not None

    def __call__(self, piece: AnswerPiece) -> AnswerPiece:
        # 1. Wait for the name.
        text, name = self._held + piece.text, ""
        if self._arguments is None:
            if self._only is not None:
                name = self._only
            elif (head := _HEAD.match(text)) and head[1] in self._names:
                name, text = head[1], text[head.end() :]
            else:
                self._held = "" if piece.finish else text
                return replace(piece, text=text if piece.finish else "")
            self._arguments = ""
        # 2. All that follows is arguments. If the answer has the name, a last brace ends the call.
        cut = len(text if self._only is not None else text.rstrip().removesuffix("}").rstrip())
        arguments, self._held = text[:cut], text[cut:]
        self._arguments += arguments
        finish = piece.finish
        if finish is not None and isinstance(parse_json(self._arguments), dict):
            finish = "tool_calls"
        elif finish is not None and piece.stop != CLOSE:  # it is cut off
            arguments += self._held
        return replace(piece, text="", call_id=self._id, name=name, arguments=arguments, finish=finish)


class TextOrCall:
    """Reads an answer that is text, a call between the marks of its form, or a text and then a call."""

    def __init__(self, functions: Sequence[FunctionDescription]) -> None:
        self._functions = functions
        self._held = ""  # text that may be the beginning of the mark; then the mark
        self._call: CallReader | None = None

    def __call__(self, piece: AnswerPiece) -> AnswerPiece:
        if self._call is not None:
            return self._read(self._call, piece)
        # 1. A call begins with its mark; the line ends before it are part of it.
        text, self._held = self._held + piece.text, ""
        before, mark, rest = text.partition(_OPEN)
        if mark:
            self._call = CallReader(self._functions, marked=True)
            self._held = text[len(before.rstrip("\n")) : len(before) + len(mark)]
            read = self._read(self._call, replace(piece, text=rest))
            return replace(read, text=before.rstrip("\n") + read.text)
        # 2. Without one, all is text but what may become a mark.
        if piece.finish is None:
            begun = next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)
            cut = len(text[: len(text) - begun].rstrip("\n"))
            text, self._held = text[:cut], text[cut:]
        return replace(piece, text=text)

    def _read(self, call: CallReader, piece: AnswerPiece) -> AnswerPiece:
        """Return a piece of a call. What turns out to be no call is text as it was written."""
        read = call(piece)
        if call.begun or piece.finish is None:
            return read
        return replace(read, text=self._held + read.text + (CLOSE if read.stop == CLOSE else ""))
