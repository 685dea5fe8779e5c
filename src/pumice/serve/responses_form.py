"""Answers in the form of OpenAI's newer protocol, /v1/responses, whole or as events.

Source: OpenAI's API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from pumice.serve.answers import AnswerForm, AnswerModel, AnswerPiece, named_event
from pumice.serve.protocol import ErrorBody, LogprobEntry, Usage
from pumice.serve.responses import ResponsesRequest, TextFormat, TextSettings
from pumice.serve.stored import StoredItems

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(AnswerModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[LogprobEntry] = Field(default_factory=list)


class OutputMessage(AnswerModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(AnswerModel):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class InputDetails(AnswerModel):
    cache_write_tokens: Literal[0] = 0
    cached_tokens: int


class OutputDetails(AnswerModel):
    reasoning_tokens: Literal[0] = 0


class ResponsesUsage(AnswerModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class IncompleteDetails(AnswerModel):
    reason: Literal["max_output_tokens"]


class ResponsesAnswer(AnswerModel):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None


class ResponsesEvent(AnswerModel):
    """An event of a stream. Which fields it has follows from its type."""

    type: str
    sequence_number: int
    response: ResponsesAnswer | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputMessage | OutputCall | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[LogprobEntry] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None


class ResponsesForm(AnswerForm):
    """Writes the answer to a request, whole or as events: a message, a call, or both.

    stored: where what is complete is kept for its owner, unless the request says otherwise.
    """

    def __init__(self, model: str, request: ResponsesRequest, stored: StoredItems, owner: bytes) -> None:
        self._model, self._request, self._owner = model, request, owner
        self._stored = None if request.store is False else stored
        self._created = int(time.time())
        self._id = f"resp_{secrets.token_hex(12)}"
        self._events = 0
        self._status: Status = "in_progress"
        self._output: list[OutputMessage | OutputCall] = []  # the last one grows

    def response(self, answers: Sequence[AnswerPiece], usage: Usage) -> ResponsesAnswer:
        self.piece(answers[0])
        self._close()
        return self._answer(usage)

    def begin(self, _: Usage) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(kind, response=self._answer()) for kind in kinds)

    def piece(self, piece: AnswerPiece) -> bytes:
        if piece.finish is not None:
            self._status = "incomplete" if piece.finish == "length" else "completed"
        events = b""
        # 1. Text makes a message grow, and so does an end of nothing.
        if piece.text or (piece.finish and not piece.name and not self._output):
            if not self._output:
                message = OutputMessage(id=f"msg_{self._id}", status="in_progress", content=[])
                events += self._open(message)
                message.content.append(OutputText(text=""))
                events += self._part("response.content_part.added", part=message.content[0])
            [text] = self._output[0].content if isinstance(self._output[0], OutputMessage) else []
            text.text += piece.text
            text.logprobs += piece.tokens
            if piece.text:
                logprobs = list(piece.tokens)
                events += self._part("response.output_text.delta", delta=piece.text, logprobs=logprobs)
        # 2. A call follows it.
        if piece.name:
            if self._output:
                events += self._close("completed")
            call = OutputCall(
                id=f"fc_{self._id}",
                call_id=piece.call_id,
                name=piece.name,
                arguments="",
                status="in_progress",
            )
            events += self._open(call)
        if piece.arguments and isinstance(call_item := self._output[-1], OutputCall):
            call_item.arguments += piece.arguments
            events += self._of_item("response.function_call_arguments.delta", delta=piece.arguments)
        return events

    def end(self, usage: Usage) -> bytes:
        return self._close() + self._event(f"response.{self._status}", response=self._answer(usage))

    def error(self, error: ErrorBody) -> bytes:
        detail = error.error
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def _open(self, item: OutputMessage | OutputCall) -> bytes:
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _close(self, status: Status | None = None) -> bytes:
        """End the last item."""
        item = self._output[-1]
        item.status = status or self._status
        if isinstance(item, OutputCall):
            if self._stored is not None:
                self._stored.add_call(self._owner, item.id, item.call_id, item.name, item.arguments)
            kind = "response.function_call_arguments.done"
            events = self._of_item(kind, name=item.name, arguments=item.arguments)
        else:
            [part] = item.content
            if self._stored is not None:
                self._stored.add_text(self._owner, item.id, part.text)
            events = self._part("response.output_text.done", text=part.text, logprobs=part.logprobs)
            events += self._part("response.content_part.done", part=part)
        done = self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        return events + done

    def _part(self, kind: str, **fields: Any) -> bytes:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        """Return an event about the last item."""
        index = len(self._output) - 1
        return self._event(kind, item_id=self._output[-1].id, output_index=index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = ResponsesEvent(type=kind, sequence_number=self._events, **fields)
        self._events += 1
        return named_event(kind, event)

    def _answer(self, usage: Usage | None = None) -> ResponsesAnswer:
        """Return the response so far."""
        request = self._request
        text = request.text or TextSettings(format=TextFormat(type="text"))
        choice = request.tool_choice or "auto"
        same = {"instructions", "max_output_tokens", "temperature", "top_p"}
        return ResponsesAnswer(
            id=self._id,
            created_at=self._created,
            status=self._status,
            error=None,
            incomplete_details=IncompleteDetails(reason="max_output_tokens")
            if self._status == "incomplete"
            else None,
            metadata=request.metadata or {},
            model=self._model,
            output=self._output,
            previous_response_id=None,
            store=self._stored is not None,
            text=text.model_dump(by_alias=True, exclude_none=True),
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump() for tool in request.tools or ()],
            usage=None if usage is None else _usage(usage),
            **request.model_dump(include=same),
        )


def _usage(usage: Usage) -> ResponsesUsage:
    return ResponsesUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
