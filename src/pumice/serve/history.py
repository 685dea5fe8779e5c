"""Turn the messages of a request into a Conversation that the model's template can render."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pumice.conversation import Conversation, ImagePart, Message
from pumice.messages import Parts, join_messages, join_parts
from pumice.serve.messages import (
    AnyMessage,
    ChatMessage,
    FunctionMessage,
    ImageUrlPart,
    PastAnswer,
    ToolMessage,
)
from pumice.serve.protocol import ConversationRequest
from pumice.serve.tools import call_text
from pumice.templates import Plain, Template


def conversation(
    request: ConversationRequest,
    pictures: Mapping[str, bytes],
    template: Template | Plain,
    instruction: str = "",
) -> Conversation:
    """Return the messages of a request as a Conversation.

    pictures: field name -> file, in order. instruction: follows the system message, or the template's own.

    `join_messages` says what becomes of roles and orders that templates have no place for. What a tool gave
    becomes a message of the user's. `<image>` in a text is plain text, not a placeholder.
    """
    chat = None if isinstance(template, Plain) else template.chat
    has_system = chat is not None and chat.system is not None
    remaining_files = iter(pictures.values())
    messages = [_turn(message, remaining_files) for message in request.messages]
    first = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    if instruction:
        usual = chat.default_system if chat is not None and has_system and not first else None
        parts = join_parts((usual,) if usual else (), (instruction,))
        messages.insert(first, Message("system", parts))
    if first == len(request.messages):  # a question, wherever it was written
        messages = [replace(message, role="user") for message in messages]
    return Conversation(join_messages(messages, has_system=has_system))


def texts_of(message: AnyMessage) -> list[str]:
    """Return the texts of a message."""
    content = message.content
    if isinstance(content, str):
        return [content]
    return [part.text for part in content or () if not isinstance(part, ImageUrlPart)]


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
    message: ChatMessage | PastAnswer | ToolMessage | FunctionMessage, remaining_files: Iterator[bytes]
) -> Message:
    """Return a message with the role that it has for the template."""
    content = message.content
    if isinstance(message, PastAnswer) and not content:
        content = message.refusal or ""
    parts: Parts = (
        (content,)
        if isinstance(content, str)
        else tuple(
            ImagePart(next(remaining_files)) if isinstance(part, ImageUrlPart) else part.text
            for part in content or ()
        )
    )
    if isinstance(message, PastAnswer):
        called = [call.function for call in message.tool_calls or ()]
        called += [message.function_call] if message.function_call else []
        if called:
            parts = join_parts(parts if any(parts) else (), ("\n".join(map(call_text, called)),))
    if isinstance(message, ToolMessage | FunctionMessage):
        return Message("user", ("<tool_response>\n", *parts, "\n</tool_response>"))
    return Message("system" if message.role == "developer" else message.role, parts)
