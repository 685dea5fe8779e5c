"""Read the `messages` of chat APIs, from Python, a server's log or a row of data, as one Conversation.

Forms: OpenAI's chat completions and fine-tuning files, TRL's and Hugging Face's chat templates.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from pumice.conversation import (
    IMAGE_PLACEHOLDER,
    ImagePart,
    Message,
    Video,
    question_message,
    user_message,
)
from pumice.errors import InputError, counted, shorten

Parts = tuple[str | ImagePart, ...]

LONGEST_HEAD = 1000  # characters of a data URL before its data
_VIDEO_TYPES = ("video", "video_url")
_BASE64 = str.maketrans("-_", "+/", " \t\r\n")
_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[\w.+-]*)*(;base64)?,", re.IGNORECASE)


def read_message(value: Mapping[str, Any], number: int) -> Message:
    """Return one message of a caller, who places each picture with a part of its own.

    value: {"role", "content"}; content is text or a list of parts: {"type": "text", "text"},
    {"type": "image", "image"}, or {"type": "image_url", "image_url": {"url"}} with a path or a data URL, and
    so {"type": "video", "video"} and {"type": "video_url", "video_url": {"url"}}.
    number: of the message, from 1, for errors. Raises InputError.
    """
    role, content = _role_and_content(value, number)
    if isinstance(content, str):
        return question_message(content) if role == "user" else Message(role, (content,))
    return Message(role, _parts(content, number, iter(())))


def read_messages(values: Sequence[Any], images: Sequence[Any]) -> tuple[tuple[Message, ...], int]:
    """Return the messages of a row of data, and the number of pictures that no message places.

    images: pictures that stand beside the messages. Each replaces, in order, an `<image>` in a user's text or
    a part {"type": "image"} without a picture of its own. If there is neither, they go to the front of the
    user's first message. Raises InputError when the numbers differ.
    """
    remaining = iter(images)
    messages, placed = [], 0
    for number, value in enumerate(values, 1):
        if not isinstance(value, Mapping):
            raise InputError(f"message {number} must be an object with 'role' and 'content'")
        if value.get("weight") == 0:  # OpenAI's fine-tuning
            raise InputError(f"message {number} has weight 0, and every answer is learned; remove the row")
        role, content = _role_and_content(value, number)
        if not isinstance(content, str) and not any(map(_is_image, content)):
            content = "".join(part for part in _parts(content, number, remaining) if isinstance(part, str))
        if not isinstance(content, str):
            own = sum(_image_of(part) is None for part in filter(_is_image, content))
            _check_enough(placed + own, images)
            messages.append(Message(role, _parts(content, number, remaining)))
        else:
            own = content.count(IMAGE_PLACEHOLDER) if role == "user" else 0
            _check_enough(placed + own, images)
            shown = [next(remaining) for _ in range(own)]
            messages.append(user_message(content, shown) if own else Message(role, (content,)))
        placed += own
    unplaced = list(remaining)
    if unplaced and placed:
        raise InputError(f"{_placeholders(placed, images)}; write one placeholder per picture, or none")
    if unplaced:
        first = next((n for n, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise InputError("no message is from 'user', so no message can show the picture")
        parts = (*map(ImagePart, unplaced), *messages[first].parts)
        messages[first] = Message("user", parts)
    return join_messages(messages), len(unplaced)


def join_messages(messages: Iterable[Message], *, has_system: bool = True) -> tuple[Message, ...]:
    """Return messages as templates have a place for them.

    The role "developer" becomes "system". Messages of one role in a row become one. Templates have a place
    for one system message, the first, or (`has_system` False) for none: another goes to the front of the
    user's message that follows, or else to the end of the last message.
    """
    joined: list[Message] = []
    late: Parts = ()  # system messages that wait for the user's next one
    for message in messages:
        role, parts = "system" if message.role == "developer" else message.role, message.parts
        if role == "system" and not (has_system and all(earlier.role == "system" for earlier in joined)):
            late = join_parts(late, parts)
            continue
        if role == "user":
            parts, late = join_parts(late, parts), ()
        if joined and joined[-1].role == role:
            parts = join_parts(joined.pop().parts, parts)
        joined.append(Message(role, parts))
    if late:
        last = joined.pop() if joined else Message("user", ())
        joined.append(Message(last.role, join_parts(last.parts, late)))
    return tuple(joined)


def decode_data_url(url: str) -> bytes:
    """Return the bytes of a data URL (RFC 2397). Raises InputError if it is none."""
    match = _DATA_URL.match(url, 0, LONGEST_HEAD)
    if match is None:
        raise InputError(f"{shorten(url, 40)} is no data URL; write data:image/jpeg;base64,...")
    data = url[match.end() :]
    if not match[1]:
        return unquote_to_bytes(data)
    try:
        # Blanks and the letters for addresses are common. Anything else means that the data is damaged.
        letters = (unquote(data) if "%" in data else data).translate(_BASE64)
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{shorten(data, 40)} is not base64 ({error}); encode the file again") from error


def join_parts(first: Parts, second: Parts) -> Parts:
    """Return the parts of two messages as one, with a blank line between two texts."""
    both_text = first and second and isinstance(first[-1], str) and isinstance(second[0], str)
    return (*first, "\n\n", *second) if both_text else (*first, *second)


def _role_and_content(value: Mapping[str, Any], number: int) -> tuple[str, str | Sequence[Any]]:
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str):
        raise InputError(f"message {number} has no 'role'; write 'user', 'assistant' or 'system'")
    if role == "assistant" and content is None:  # an answer of tools alone, or a refusal
        content = value.get("refusal") or ""
    if not isinstance(content, str | list | tuple):
        raise InputError(f"message {number} has no 'content'; write text or a list of parts")
    return role, content


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and (
        part.get("type") in ("image", "image_url", *_VIDEO_TYPES)
        or (part.get("type") is None and "image" in part)
    )


def _image_of(part: Mapping[str, Any]) -> Any:
    """Return the picture or the video that a part holds itself, or None."""
    keys = ("image", "image_url", "url", "path")
    if is_video := part.get("type") in _VIDEO_TYPES:
        keys = ("video", "video_url", "url", "path")
    image: Any = next((part[key] for key in keys if part.get(key)), None)
    if isinstance(image, Mapping) and "url" in image:
        image = image["url"]
    if isinstance(image, str) and image[:5].lower() == "data:":
        image = decode_data_url(image)
    return Video(image) if is_video and image is not None and not isinstance(image, Video) else image


def _parts(content: Sequence[Any], number: int, images: Iterator[Any]) -> Parts:
    parts: list[str | ImagePart] = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(text := part.get("text"), str) and not _is_image(part):
            parts.append(text)
            continue
        image = _image_of(part) if _is_image(part) else None
        image = next(images, None) if image is None and _is_image(part) else image
        if image is None:
            raise InputError(
                f"message {number}: unknown part {shorten(part)}; write {{'type': 'text', 'text': ...}} "
                "or {'type': 'image', 'image': ...}"
            )
        parts.append(ImagePart(image))
    return tuple(parts)


def _check_enough(placed: int, images: Sequence[Any]) -> None:
    if placed > len(images):
        raise InputError(f"{_placeholders(placed, images)}; write one placeholder per picture")


def _placeholders(placed: int, images: Sequence[Any]) -> str:
    return f"{counted(placed, '<image> placeholder')} for {counted(len(images), 'picture')}"
