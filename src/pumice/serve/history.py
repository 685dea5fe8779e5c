"""Turn the messages of a request into a Conversation that the model's template can render."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pumice.conversation import Conversation, ImagePart, Message
from pumice.serve.messages import ChatMessage, FunctionMessage, ImageUrlPart, PastAnswer, ToolMessage
from pumice.serve.protocol import ConversationRequest
from pumice.serve.tools import call_text
from pumice.templates import Plain, Template

Parts = tuple[str | ImagePart, ...]


def conversation(
    request: ConversationRequest,
    pictures: Mapping[str, bytes],
    template: Template | Plain,
    instruction: str = "",
) -> Conversation:
    """Return the messages of a request as a Conversation.

    pictures: field name -> file, in order. instruction: follows the system message, or the template's own.

    The role "developer" becomes "system". Messages of one role in a row become one. Templates have a place
    for one system message, the first, or for none: another goes to the front of the user's message that
    follows, or else to the end of the last message. What a tool gave becomes a message of the user's.
    `<image>` in a text is plain text, not a placeholder.
    """
    # 1. The system messages that come first become one.
    chat = None if isinstance(template, Plain) else template.chat
    has_system = chat is not None and chat.system is not None
    remaining_files = iter(pictures.values())
    turns = [_turn(message, remaining_files) for message in request.messages]
    system: Parts = ()
    while turns and turns[0][0] == "system":
        system = _joined(system, turns.pop(0)[1])
    if instruction:
        usual = chat.default_system if chat is not None and has_system else None
        system = _joined(system or ((usual,) if usual else ()), (instruction,))
    if not turns:  # a question, wherever it was written
        return Conversation((Message("user", system),))
    # 2. Each other message joins the one before it, or begins a new one.
    messages = [Message("system", system)] if system and has_system else []
    late = () if has_system else system  # system messages that wait for the user's next one
    for role, parts in turns:
        if role == "system":
            late = _joined(late, parts)
            continue
        if role == "user":
            parts, late = _joined(late, parts), ()
        if messages and messages[-1].role == role:
            parts = _joined(messages.pop().parts, parts)
        messages.append(Message(role, parts))
    if late:
        messages.append(Message(messages[-1].role, _joined(messages.pop().parts, late)))
    return Conversation(tuple(messages))


def _turn(
    message: ChatMessage | PastAnswer | ToolMessage | FunctionMessage, remaining_files: Iterator[bytes]
) -> tuple[str, Parts]:
    """Return the role of a message for the template, and its texts and pictures."""
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
            parts = _joined(parts if any(parts) else (), ("\n".join(map(call_text, called)),))
    if isinstance(message, ToolMessage | FunctionMessage):
        return "user", ("<tool_response>\n", *parts, "\n</tool_response>")
    return "system" if message.role == "developer" else message.role, parts


def _joined(first: Parts, second: Parts) -> Parts:
    """Return the parts of two messages as one, with a blank line between two texts."""
    both_text = first and second and isinstance(first[-1], str) and isinstance(second[0], str)
    return (*first, "\n\n", *second) if both_text else (*first, *second)
