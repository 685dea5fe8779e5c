"""Answers in the form of OpenAI's newer protocol, /v1/responses, whole or as events.

Source: OpenAI's API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from pumice.serve.answers import EVENTS, AnswerModel, AnswerPiece, join
from pumice.serve.protocol import ErrorBody, LogprobEntry, PromptProgress, Usage
from pumice.serve.responses import ResponsesRequest, TextFormat, TextSettings


class OutputText(AnswerModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[LogprobEntry] = Field(default_factory=list)


class OutputMessage(AnswerModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(AnswerModel):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(AnswerModel):
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
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
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


class ResponsesForm:
    """Writes the answer to a request, whole or as events."""

    media_type = EVENTS

    def __init__(self, model: str, request: ResponsesRequest) -> None:
        self._model, self._request = model, request
        self._created = int(time.time())
        self._id, self._item_id = (f"{kind}_{secrets.token_hex(12)}" for kind in ("resp", "item"))
        self._events = 0
        self._pieces: list[AnswerPiece] = []
        self._opened = False  # whether the item of the answer was announced

    def response(self, answers: Sequence[AnswerPiece], usage: Usage) -> ResponsesAnswer:
        return self._answer(answers[0], usage)

    def begin(self) -> bytes:
        return b"".join(
            self._event(f"response.{kind}", response=self._answer(None))
            for kind in ("created", "in_progress")
        )

    def piece(self, piece: AnswerPiece) -> bytes:
        self._pieces.append(piece)
        events = b""
        # 1. Announce the item once it is clear what it is.
        if not self._opened and (piece.text or piece.name or piece.finish):
            self._opened = True
            item = self._item(AnswerPiece(call_id=piece.call_id, name=piece.name), "in_progress")
            events += self._event("response.output_item.added", output_index=0, item=item)
            if isinstance(item, OutputMessage):
                events += self._part("response.content_part.added", part=OutputText(text=""))
        # 2. Send what it grew by.
        if piece.arguments:
            kind = "response.function_call_arguments.delta"
            events += self._event(kind, item_id=self._item_id, output_index=0, delta=piece.arguments)
        if piece.text:
            events += self._part("response.output_text.delta", delta=piece.text, logprobs=list(piece.tokens))
        return events

    def progress(self, progress: PromptProgress) -> bytes:
        return b""  # the protocol has no event for it

    def end(self, usage: Usage) -> bytes:
        answer = self._answer(join(self._pieces), usage)
        [item] = answer.output
        if isinstance(item, OutputCall):
            events = self._event(
                "response.function_call_arguments.done",
                item_id=self._item_id,
                output_index=0,
                name=item.name,
                arguments=item.arguments,
            )
        else:
            [part] = item.content
            events = self._part("response.output_text.done", text=part.text, logprobs=part.logprobs)
            events += self._part("response.content_part.done", part=part)
        events += self._event("response.output_item.done", output_index=0, item=item)
        return events + self._event(f"response.{answer.status}", response=answer)

    def error(self, error: ErrorBody) -> bytes:
        detail = error.error
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def _part(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = ResponsesEvent(type=kind, sequence_number=self._events, **fields)
        self._events += 1
        values = event.model_dump_json(include={"type", "sequence_number", *fields})
        return f"event: {kind}\ndata: {values}\n\n".encode()

    def _item(
        self, answer: AnswerPiece, status: Literal["in_progress", "completed", "incomplete"]
    ) -> OutputMessage | OutputCall:
        if answer.name:
            return OutputCall(
                id=self._item_id,
                call_id=answer.call_id,
                name=answer.name,
                arguments=answer.arguments,
                status=status,
            )
        content = [OutputText(text=answer.text, logprobs=list(answer.tokens))]
        return OutputMessage(id=self._item_id, status=status, content=content[: status != "in_progress"])

    def _answer(self, answer: AnswerPiece | None, usage: Usage | None = None) -> ResponsesAnswer:
        """Return the response; without an answer it has just begun."""
        request = self._request
        status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
        if answer is not None:
            status = "incomplete" if answer.finish == "length" else "completed"
        text = request.text or TextSettings(format=TextFormat(type="text"))
        choice = request.tool_choice or "auto"
        return ResponsesAnswer(
            id=self._id,
            created_at=self._created,
            status=status,
            incomplete_details=IncompleteDetails(reason="max_output_tokens")
            if status == "incomplete"
            else None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=self._model,
            output=[] if answer is None else [self._item(answer, status)],
            temperature=request.temperature,
            text=text.model_dump(by_alias=True, exclude_none=True),
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump() for tool in request.tools or ()],
            top_p=request.top_p,
            usage=None if usage is None else _usage(usage),
        )


def _usage(usage: Usage) -> ResponsesUsage:
    return ResponsesUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
