"""Conversations: messages of text and pictures, and the checks that they must pass.

A picture stays what the caller passed (a path, bytes, a PIL image, or a picture inside a larger file). Only
`pumice.images` opens it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

from pumice.errors import InputError, RowError, counted, near
from pumice.media import Frames

IMAGE_PLACEHOLDER = "<image>"
REF_PLACEHOLDER, BOX_PLACEHOLDER = "<ref-object>", "<bbox>"  # ms-swift's
BOX_UNITS = ("real", "norm1", "norm1000")  # pixels of the picture, shares and thousandths of its sides
VIDEO_PLACEHOLDER = "<video>"  # in rows of data
ROLES = ("system", "user", "assistant")
_FILES = r"(_?(path|file|name|url)s?)?"
# How other programs name the key `image` of a row, and keys of what cannot be shown to a model here.
_PICTURES = re.compile(
    rf"(image|img|picture|pic|photo|frame|screenshot|figure|media|attachment)s?{_FILES}", re.IGNORECASE
)
_VIDEOS = re.compile(rf"videos?{_FILES}", re.IGNORECASE)
_READ = {"image": ("image",), "video": ("video", "videos")}  # the keys of a row that are read
_SOUNDS = re.compile(rf"(audio|sound)s?{_FILES}", re.IGNORECASE)


@dataclass(frozen=True)
class StoredImage:
    """A picture inside a larger file, such as a table or an archive, read where it lies; also of a Video.

    key: equal keys mean equal pictures. name: for messages. load: return the bytes of the picture's own file.
    size: (width, height) as it is shown, if that is known already.
    """

    key: Hashable
    name: str = field(compare=False)
    load: Callable[[], bytes] = field(compare=False, repr=False)
    size: tuple[int, int] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Video:
    """A video or an animation, also inside a larger file, or frames taken of one.

    frames: how many are shown; None: as the model was trained.
    """

    source: str | PathLike[str] | bytes | StoredImage | Frames
    frames: int | None = None

    @property
    def file(self) -> str | PathLike[str] | bytes | StoredImage:
        """What holds the video. Raises InputError if only its frames are known."""
        if isinstance(self.source, Frames):
            raise InputError(f"the {self.name} has no file; give the video itself")
        return self.source

    @property
    def name(self) -> str:
        if isinstance(self.source, StoredImage):
            return self.source.name
        if isinstance(self.source, bytes):
            return f"video of {len(self.source)} bytes"
        if isinstance(self.source, Frames):
            return f"video of {counted(len(self.source.images), 'frame')}"
        return str(self.source)


@dataclass(frozen=True)
class ImagePart:
    """One picture in a message: a path, raw file bytes, a PIL image, or a StoredImage; or a Video.

    frame: "frame" or "last" of a picture that is one of a video's, which is never cut into tiles.
    """

    source: str | PathLike[str] | bytes | Any
    frame: str = ""

    @property
    def name(self) -> str:
        """Return the name of the picture for messages to users."""
        if isinstance(self.source, bytes):
            return f"picture of {len(self.source)} bytes"
        if isinstance(self.source, str | PathLike):
            return str(self.source)
        if isinstance(self.source, StoredImage | Video):
            return self.source.name
        return type(self.source).__name__


@dataclass(frozen=True)
class Message:
    """One turn: the speaker, and the text and pictures in order."""

    role: str
    parts: tuple[str | ImagePart, ...]

    @property
    def text(self) -> str:
        return "".join(p for p in self.parts if isinstance(p, str))

    @property
    def images(self) -> list[ImagePart]:
        return [p for p in self.parts if isinstance(p, ImagePart)]


@dataclass(frozen=True)
class Objects:
    """Names and boxes of a row's things, which replace `<ref-object>` and `<bbox>` in its texts in order.

    boxes: (left, top, right, bottom). unit: one of BOX_UNITS, "" if the row does not say it. images: the
    number of each box's picture, from 0.
    """

    refs: tuple[str, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    unit: str = ""
    images: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages in order: an optional system message, then user and assistant in turn.

    A conversation to answer may begin with a greeting of the assistant's.
    """

    messages: tuple[Message, ...]
    id: str = ""
    objects: Objects | None = None

    @property
    def images(self) -> list[ImagePart]:
        return [image for message in self.messages for image in message.images]

    def with_sources(self, change: Callable[[Any], Any]) -> Conversation:
        """Return the same conversation with `change` applied to every picture's source."""
        return self.with_parts(lambda part: (replace(part, source=change(part.source)),))

    def with_parts(self, change: Callable[[ImagePart], tuple[str | ImagePart, ...]]) -> Conversation:
        """Return the same conversation with each picture replaced by the parts that `change` gives for it."""
        messages = []
        for message in self.messages:
            parts: list[str | ImagePart] = []
            for part in message.parts:
                parts += change(part) if isinstance(part, ImagePart) else (part,)
            messages.append(replace(message, parts=tuple(parts)))
        return replace(self, messages=tuple(messages))

    def check(self, *, answered: bool, continued: bool = False) -> Conversation:
        """Return the conversation. Raise InputError unless its roles alternate.

        answered: True for training (the user begins, the last message is an answer that is not empty), False
        for asking (the last message is a question: words, a picture, or both). continued: of asking, the last
        message is the beginning of an answer instead.
        """
        prefix = f"conversation {self.id!r}: " if self.id else ""
        # 1. A system message may come first. It does not count as a turn.
        system = self.messages[:1] if self.messages and self.messages[0].role == "system" else ()
        turns = self.messages[len(system) :]
        if any(message.images for message in system):
            reason = f"{prefix}the system message holds a picture; only the user can show one"
            raise RowError("placeholder count", reason)
        if not turns:
            reason = f"{prefix}there are no messages; give at least one question"
            raise RowError("roles out of order", reason)
        # 2. A text that is not valid Unicode would fail much later, in the tokenizer.
        for message in self.messages:
            try:
                message.text.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair, as cut JSON escapes leave it
                half = message.text[error.start]
                reason = f"{prefix}a text holds half of a character, {half!r}; remove it"
                raise RowError("broken text", reason) from error
        # 3. User and assistant take turns, as every template expects.
        greeting = not answered and len(turns) > 1 and turns[0].role == "assistant"
        for number, message in enumerate(turns):
            expected = ("user", "assistant")[(number + greeting) % 2]
            if message.role not in ROLES:
                reason = f"{prefix}unknown role {message.role!r}; use one of {', '.join(ROLES)}"
                raise RowError("unknown speaker", reason)
            if message.role != expected:
                raise RowError(
                    "roles out of order",
                    f"{prefix}message {number + 1} is from {message.role!r} where {expected!r} should speak; "
                    "a conversation starts with the user and takes turns",
                )
            if message.images and message.role != "user":
                reason = f"{prefix}message {number + 1}: only the user can show a picture"
                raise RowError("placeholder count", reason)
            if answered and message.role == "assistant" and not message.text.strip():
                reason = f"{prefix}message {number + 1} is an empty answer; remove the turn"
                raise RowError("empty answer", reason)
        # 4. Training needs an answer at the end, asking needs a question.
        last_role = turns[-1].role
        if answered and last_role != "assistant":
            raise RowError("roles out of order", f"{prefix}the last question has no answer to learn from")
        if continued and last_role != "assistant":
            raise InputError(f"{prefix}the last message must be the assistant's, which is to be continued")
        if not answered and not continued:
            if last_role != "user":
                raise InputError(f"{prefix}the last message must be a question from the user")
            if not (turns[-1].text.strip() or turns[-1].images):
                raise InputError(f"{prefix}the question is empty; say what you want to know")
        return self


def user_message(text: str, images: Sequence[Any] = ()) -> Message:
    """Return a user's turn as LLaVA writes it: pictures first, then the text.

    `<image>` in the text marks the position of a picture. If it occurs, it must occur once per picture.
    A single picture always moves to the front of its message (LLaVA's own rule). Several pictures stay
    where they are written.
    """
    return Message("user", _with_images(text, [ImagePart(i) for i in images], "question"))


def question_message(text: str, images: Sequence[Any] = ()) -> Message:
    """Return the turn of a user who asks, in which `<image>` may also be a word of the question.

    It marks the position of a picture where the text begins or ends with it, or where several occur, one per
    picture. Raises InputError when a question begins with it and has another number of them than of pictures.
    """
    bare, count = text.strip(), text.count(IMAGE_PLACEHOLDER)
    begins, ends = bare.startswith(IMAGE_PLACEHOLDER), bare.endswith(IMAGE_PLACEHOLDER)
    marks = begins or (count == len(images) and (count > 1 or ends))
    if count and not (images and marks):
        return Message("user", (*map(ImagePart, images), text))
    return user_message(text, images)


def from_llava(row_id: str, turns: Iterable[tuple[str, str]], images: Sequence[Any] = ()) -> Conversation:
    """Return a LLaVA-Instruct row as a Conversation.

    turns: (speaker, text), speaker "human", "gpt" or "system". The row's pictures replace the
    `<image>` placeholders in order. Raises InputError when their numbers differ.
    """
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    unused_images = [ImagePart(i) for i in images]
    image_count = len(unused_images)
    messages: list[Message] = []
    turns = list(turns)
    # 1. ShareGPT's rows may begin with the end of an exchange. LLaVA leaves it out, too.
    left_out = int(len(turns) > 1 and turns[0][0] == "gpt")
    if left_out:
        turns = turns[1:]
    # 2. Each placeholder of a user stands for one picture.
    placeholder_count = sum(text.count(IMAGE_PLACEHOLDER) for speaker, text in turns if speaker == "human")
    if placeholder_count != image_count:
        stray = sum(IMAGE_PLACEHOLDER in text for speaker, text in turns if speaker != "human")
        raise RowError(
            "placeholder count",
            f"row {row_id!r}: {counted(placeholder_count, '<image> placeholder')} for "
            f"{counted(image_count, 'picture')}; "
            "write one placeholder per picture" + (", in a turn of 'human'" if stray else ""),
        )
    # 3. Turns become messages, each with the pictures of its placeholders.
    first_turn = 1 if turns and turns[0][0] == "system" else 0
    for number, (speaker, text) in enumerate(turns):
        if speaker not in names:
            reason = f"row {row_id!r}: unknown speaker {speaker!r}; use 'human' or 'gpt'"
            raise RowError("unknown speaker", reason)
        expected = ("human", "gpt")[(number - first_turn) % 2]
        if number >= first_turn and speaker != expected:
            raise RowError(
                "roles out of order",
                f"row {row_id!r}: turn {number + 1 + left_out} is from {speaker!r} where {expected!r} should "
                "speak; a row starts with 'human' and takes turns",
            )
        if speaker != "human":
            messages.append(Message(names[speaker], (text,)))
            continue
        count = text.count(IMAGE_PLACEHOLDER)
        messages.append(Message("user", _with_images(text, unused_images[:count], f"row {row_id!r}")))
        unused_images = unused_images[count:]
    return Conversation(tuple(messages), id=row_id)


def check_media(row: Mapping[str, Any], label: str) -> None:
    """Raise InputError if a row names pictures or videos under a key that is not read, or sounds.

    Such a row would be answered or learned as text alone. label: names the row. Keys without a value count
    as absent.
    """
    given = [key for key, value in row.items() if value is not None and value not in ("", [], {})]
    for key in given:
        if key in _READ["video"]:
            continue
        if _VIDEOS.fullmatch(key):
            raise InputError(f"{label}: the key {key!r} is not read; did you mean 'video'?")
        if _SOUNDS.fullmatch(key):
            raise InputError(
                f"{label}: {key!r} cannot be used, only pictures and videos; remove the row or the key"
            )
        meant = _meant(key)
        if meant is not None and not any(name in given for name in _READ[meant]):
            raise InputError(f"{label}: the key {key!r} is not read; did you mean {meant!r}?")


@functools.lru_cache(1024)  # all rows of a source have the same few keys
def _meant(key: str) -> str | None:
    """Return "image" or "video" for a key that seems to name pictures or videos, else None."""
    return near(key.lower(), _READ, 0.8) or ("image" if _PICTURES.fullmatch(key) else None)


def _with_images(text: str, images: Sequence[ImagePart], label: str) -> tuple[str | ImagePart, ...]:
    count = text.count(IMAGE_PLACEHOLDER)
    if count and count != len(images):
        raise InputError(
            f"{label}: {counted(count, '<image> placeholder')} for {counted(len(images), 'picture')}; "
            "write one placeholder per picture, or none"
        )
    if count <= 1:
        stripped = text.replace(IMAGE_PLACEHOLDER, "").strip() if count else text
        return (*images, stripped) if stripped else tuple(images)
    pieces = text.split(IMAGE_PLACEHOLDER)
    parts: list[str | ImagePart] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(images[number - 1])
        if piece.strip():
            parts.append(piece)
    return tuple(parts)
