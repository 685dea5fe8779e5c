"""Chat formats: a conversation becomes spans of text, each marked as supervised or not.

Knows roles and wording. Does not know tokens or pixels. A template is chosen by the `template` field
of a model's config, for training and serving alike.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pumice.conversation import Conversation, ImagePart, Message
from pumice.errors import InputError


@dataclass(frozen=True)
class Span:
    """A piece of text. supervised: the model learns to write it.

    control: written by the template, so that it may hold the tokenizer's special tokens. What people
    write never does: `<|im_end|>` in a question is text.
    """

    text: str
    supervised: bool = False
    control: bool = False


Spans = list[Span | ImagePart]


@dataclass(frozen=True)
class Template:
    """A format that writes every message between fixed strings.

    stop: what ends an answer, supervised with it. between: what follows `stop` before the next turn.
    """

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: str
    stop: str
    between: str

    def render(self, conversation: Conversation, *, generate: bool = False) -> Spans:
        """Spans of a checked conversation; `generate` ends them where the model's answer begins."""
        spans: Spans = []
        for number, message in enumerate(conversation.messages):
            if message.role == "assistant":
                # A space at the front would merge with the newline before it, which stands alone when
                # the model begins to answer.
                text = message.text.lstrip() if self.assistant.endswith("\n") else message.text
                spans.append(Span(self.assistant, control=True))
                spans.append(Span(text, supervised=True))
                spans.append(Span(self.stop, supervised=True, control=True))
                if number + 1 < len(conversation.messages):
                    spans.append(Span(self.between, control=True))
            else:
                before, after = self.system if message.role == "system" else self.user
                spans.append(Span(before, control=True))
                spans += _content(message)
                spans.append(Span(after, control=True))
        if generate:
            spans.append(Span(self.assistant, control=True))
        return [s for s in spans if isinstance(s, ImagePart) or s.text]


@dataclass(frozen=True)
class Plain:
    """Stage 1 of LLaVA: the picture, its caption, a newline. What the human says is dropped."""

    name: str = "plain"
    stop: str = "\n"

    def render(self, conversation: Conversation, *, generate: bool = False) -> Spans:
        spans: Spans = []
        for message in conversation.messages:
            spans += message.images
            if message.role == "assistant":
                spans.append(Span(message.text + self.stop, supervised=True))
        return spans


def _content(message: Message) -> Spans:
    """Leading pictures each stand on a line of their own (`<image>\\n`), later ones where they are."""
    spans: Spans = []
    leading = True
    for number, part in enumerate(message.parts):
        if isinstance(part, ImagePart):
            spans.append(part)
            if leading and number + 1 < len(message.parts):
                spans.append(Span("\n"))
        else:
            # A row may write that new line itself, and must not get two where a question gets one.
            spans.append(Span(part.lstrip("\n") if leading and number else part))
            leading = False
    return spans


TEMPLATES: dict[str, Template | Plain] = {
    "plain": Plain(),
    "chatml": Template(
        name="chatml",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        stop="<|im_end|>",
        between="\n",
    ),
}


def get_template(name: str) -> Template | Plain:
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown template {name!r}; {hint}known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
