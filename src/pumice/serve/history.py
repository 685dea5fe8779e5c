"""Turn the messages of a request into a Conversation that the model's template can render."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pumice.conversation import Conversation, ImagePart, Message, Video
from pumice.errors import InputError
from pumice.messages import Parts, join_messages, join_parts
from pumice.serve.messages import (
    AnyMessage,
    ChatMessage,
    FunctionMessage,
    ImageUrlPart,
    PastAnswer,
    ToolMessage,
    VideoUrlPart,
)
from pumice.serve.protocol import ConversationRequest
from pumice.serve.tools import past_call
from pumice.templates import RESULT, Plain, Template


def conversation(
    request: ConversationRequest,
    pictures: Mapping[str, bytes | Video],
    template: Template | Plain,
    instruction: str = "",
) -> Conversation:
    """Return the messages of a request as a Conversation.

    pictures: field name -> file or video, in order. instruction: follows the system message, or the
    template's own.

    `join_messages` says what becomes of roles and orders that templates have no place for. What tools gave
    becomes a message of the user's. Pictures elsewhere go to the front of the user's next message.
    `<image>` in a text is plain text, not a placeholder. Raises InputError for a picture of a last answer.
    """
    chat = None if isinstance(template, Plain) else template.chat
    has_system = chat is not None and chat.system is not None
    # 1. One turn for each message, but one for all that tools gave to one answer.
    files = iter(pictures.values())
    messages: list[Message] = []
    waiting: Parts = ()  # pictures of others than the user
    was_result = False
    for message in request.messages:
        turn = _turn(message, files, None if chat is None else chat.tools)
        if turn.role != "user":
            waiting += tuple(turn.images)
            turn = Message(turn.role, tuple(part for part in turn.parts if isinstance(part, str)))
        elif waiting:
            turn, waiting = Message("user", (*waiting, *turn.parts)), ()
        is_result = isinstance(message, ToolMessage | FunctionMessage)
        if is_result and was_result:
            turn = Message("user", (*messages.pop().parts, "\n", *turn.parts))
        if turn.parts or turn.role != "system":
            messages.append(turn)
        was_result = is_result
    if waiting and messages and messages[-1].role == "assistant":
        raise InputError("the last answer has a picture; put it into the question before")
    if waiting:
        messages.append(Message("user", waiting))
    # 2. Tell of functions. If there are only system messages, they are the question.
    first = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    only_system = first == len(messages)
    if instruction:
        usual = chat.default_system if chat is not None and has_system and not first else None
        parts = join_parts((usual,) if usual else (), (instruction,))
        messages.insert(first, Message("system", parts))
    if only_system:  # a question, wherever it was written
        messages = [replace(message, role="user") for message in messages]
    return Conversation(join_messages(messages, has_system=has_system))


def texts_of(message: AnyMessage) -> list[str]:
    """Return the texts of a message."""
    content = message.content
    if isinstance(content, str):
        return [content]
    return [part.text for part in content or () if not isinstance(part, ImageUrlPart | VideoUrlPart)]


def characters_of(request: ConversationRequest) -> int:
    """Return how much text a request holds, its calls included."""
    calls = (
        call.function.arguments
        for message in request.messages
        if isinstance(message, PastAnswer)
        for call in message.tool_calls or ()
    )
    return sum(map(len, (*calls, *(text for message in request.messages for text in texts_of(message)))))


def _turn(
    message: ChatMessage | PastAnswer | ToolMessage | FunctionMessage,
    files: Iterator[bytes | Video],
    around: tuple[str, str] | None,
) -> Message:
    """Return a message with the role that it has for the template. around: as of `past_call`."""
    content = message.content
    if isinstance(message, PastAnswer) and not content:
        content = message.refusal or ""
    parts: Parts = (
        (content,)
        if isinstance(content, str)
        else tuple(
            ImagePart(next(files)) if isinstance(part, ImageUrlPart | VideoUrlPart) else part.text
            for part in content or ()
        )
    )
    if isinstance(message, PastAnswer):
        called = [call.function for call in message.tool_calls or ()]
        called += [message.function_call] if message.function_call else []
        if called:
            calls = "\n".join(past_call(call, around) for call in called)
            between = "\n" if around else "\n\n"
            parts = (*parts, between, calls) if any(parts) else (calls,)
    if isinstance(message, ToolMessage | FunctionMessage):
        return Message("user", (RESULT[0], *parts, RESULT[1]))
    return Message("system" if message.role == "developer" else message.role, parts)
