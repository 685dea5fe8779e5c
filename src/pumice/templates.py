"""Turn a conversation into spans of text in a chat format, each marked as supervised or not.

The `template` field of a model's config chooses the format, for training and serving alike. "own" means the
format in the config's `chat` field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pumice.config import ChatFormat
from pumice.config_json import from_dict
from pumice.conversation import Conversation, ImagePart, Message
from pumice.errors import InputError, near

OWN = "own"
# Around a call of a function and what it gave, as Qwen2.5 and Qwen3 write them.
CALL = ("<tool_call>\n", "\n</tool_call>")
RESULT = ("<tool_response>\n", "\n</tool_response>")


@dataclass(frozen=True)
class Span:
    """A piece of text. supervised: the model learns to write it.

    control: the template wrote it, so it may hold special tokens. A user's text never does: `<|im_end|>`
    in a question is ordinary text.
    """

    text: str
    supervised: bool = False
    control: bool = False


Spans = list[Span | ImagePart]


@dataclass(frozen=True)
class Template:
    """Writes a conversation between the fixed texts of one chat format."""

    name: str
    chat: ChatFormat

    @property
    def stop(self) -> str:
        return self.chat.stop

    @property
    def specials(self) -> tuple[str, ...]:
        return self.chat.specials

    def render(self, conversation: Conversation, *, generate: bool = False) -> Spans:
        """Spans of a checked conversation; `generate` ends them where the model goes on to write."""
        chat = self.chat
        turns = [message for message in conversation.messages if message.role != "system"]
        system = self._system(conversation)
        spans: Spans = [] if chat.system_in_user else [*system]
        first_question = next((n for n, turn in enumerate(turns, 1) if turn.role == "user"), 1)
        for number, message in enumerate(turns, 1):
            if message.role == "assistant":
                answer = self._answer(message, newest=number == len(turns))
                is_continued = generate and number == len(turns)
                spans += answer[:3] if is_continued else answer  # the last two end an answer
                if number < len(turns):
                    spans.append(Span(chat.between, control=True))
            else:
                spans.append(Span(chat.user[0], control=True))
                if number == first_question and chat.system_in_user:
                    spans += system
                if message.parts and isinstance(message.parts[0], str):
                    spans.append(Span(chat.text_first, control=True))
                spans += _content(message, chat)
                spans.append(Span(chat.user[1], control=True))
        if generate and turns[-1].role == "user":
            spans.append(Span(chat.assistant + chat.opening, control=True))
        return [s for s in spans if isinstance(s, ImagePart) or s.text]

    def _system(self, conversation: Conversation) -> list[Span]:
        system_texts = [message.text for message in conversation.messages if message.role == "system"]
        if system_texts and self.chat.system is None:
            raise InputError(
                f"the template {self.name!r} has no place for a system message; write it into the question"
            )
        text = system_texts[0] if system_texts else self.chat.default_system
        if text is None or self.chat.system is None:
            return []
        before, after = self.chat.system
        text = text.strip() if "system" in self.chat.trim else text
        return [Span(before, control=True), Span(text), Span(after, control=True)]

    def _answer(self, message: Message, newest: bool) -> list[Span]:
        chat = self.chat
        opens = chat.assistant + chat.opening if newest else chat.earlier or chat.assistant
        text = message.text.strip() if "assistant" in chat.trim else message.text
        if (chat.user[1] + opens + chat.answer[0]).endswith("\n"):
            # A space at the front would merge with the newline before it, which is a token of its own when
            # the model begins to answer.
            text = text.lstrip()
        return [
            Span(opens, control=True),
            Span(chat.answer[0], supervised=True, control=True),
            Span(text, supervised=True),
            Span(chat.answer[1], supervised=True, control=True),
            Span(chat.stop if newest or not chat.stop_once else "", supervised=True, control=True),
        ]


@dataclass(frozen=True)
class Plain:
    """Stage 1 of LLaVA: the picture, its caption, a newline. What the human says is dropped."""

    name: str = "plain"
    stop: str = "\n"
    specials: tuple[str, ...] = ()

    def render(self, conversation: Conversation, *, generate: bool = False) -> Spans:
        spans: Spans = []
        for message in conversation.messages:
            spans += message.images
            if message.role == "assistant":
                spans.append(Span(message.text + self.stop, supervised=True))
        return spans


def _content(message: Message, chat: ChatFormat) -> Spans:
    """Leading pictures each stand on a line of their own (`<image>\\n`), later ones where they are.

    Leading ones have one line together in a format with `shared_line`, and none without `image_line`.
    """
    parts, trim = list(message.parts), "user" in chat.trim
    if trim and parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if trim and parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    spans: Spans = []
    leading = chat.image_line
    for number, part in enumerate(parts):
        if isinstance(part, ImagePart):
            spans.append(part)
            following = parts[number + 1] if number + 1 < len(parts) else None
            same_line = part.frame == "frame"  # a video is one line
            same_line |= chat.shared_line and isinstance(following, ImagePart)
            if leading and following is not None and not same_line:
                spans.append(Span("\n"))
        else:
            # A row may hold this newline already, and must not get a second one.
            spans.append(Span(part.lstrip("\n") if leading and number else part))
            leading = False
    return spans


def tools_text(around: tuple[str, str], tools: Sequence[Mapping[str, Any]]) -> str:
    """Return what tells the model of functions. around: `ChatFormat.tools`."""
    return around[0] + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + around[1]


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call of a function as a model writes it."""
    called = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return CALL[0] + called + CALL[1]


def result_text(text: str) -> str:
    """Return what a function gave as a model reads it, in a question."""
    return RESULT[0] + text + RESULT[1]


# The wording is that of haotian-liu/LLaVA, llava/conversation.py, which its checkpoints were trained on.
_FORMATS: dict[str, ChatFormat] = {
    name: from_dict(ChatFormat, values, name)
    for name, values in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}
_SAME = {"vicuna_v1": "v1", "llava_v0": "v0"}  # further names of LLaVA's
TEMPLATES: dict[str, Template | Plain] = {
    "plain": Plain(),
    **{name: Template(name, chat) for name, chat in _FORMATS.items()},
    **{name: Template(name, _FORMATS[first]) for name, first in _SAME.items()},
}


def get_template(name: str, chat: ChatFormat | None = None) -> Template | Plain:
    """Return the template for a config's `template` and `chat` fields. Raises InputError if there is none."""
    if name == OWN:
        if chat is None:
            raise InputError(f"the template {OWN!r} needs the format that it stands for, and none is given")
        return Template(name, chat)
    if name not in TEMPLATES:
        hint = f"did you mean {meant!r}? " if (meant := near(name, TEMPLATES)) else ""
        raise InputError(f"unknown template {name!r}; {hint}known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
