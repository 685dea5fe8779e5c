"""Run a Jinja chat template in a sandbox, as transformers runs it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from pumice.conversation import IMAGE_PLACEHOLDER

Turn = tuple[str, str]  # role, text
# Texts for probe conversations. They occur in no template, so that they are found in what it writes.
SYSTEM = ("system", "textofsystem")
QUESTIONS = [("user", f"text{n}ofuser") for n in ("one", "two", "three")]
ANSWERS = [("assistant", f"text{n}ofassistant") for n in ("one", "two")]
_LONGEST = 100_000  # characters of a probe conversation, far more than any real template writes


class Unsupported(Exception):
    """A chat template writes something that no ChatFormat can."""


class Jinja:
    """A chat template, run as transformers runs it."""

    def __init__(self, source: str, bos: str | None, eos: str | None, specials: Collection[str]) -> None:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class GenerationTag(Extension):
            """{% generation %} marks what the model writes, for transformers; it adds no text."""

            def __init__(self, environment: Any) -> None:
                super().__init__(environment)
                self.tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # The settings of transformers' `apply_chat_template`.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # the parser may run out of stack or memory
            raise Unsupported(f"it is not Jinja: {error}") from error
        self._tokens = {"bos_token": bos or "", "eos_token": eos or ""}
        self.bos = bos or ""
        self.parts = False  # whether the template wants a message's content as a list of parts
        self.wrap: tuple[str, str] | None = None  # the special tokens around a picture
        # Templates of text models take text; those of models with pictures want a list of parts.
        try:
            takes_text = QUESTIONS[0][1] in self.raw([QUESTIONS[0]])
        except Unsupported:
            takes_text = False
        if not takes_text:
            self.parts = True
            if QUESTIONS[0][1] not in self.raw([QUESTIONS[0]]):
                raise Unsupported("it leaves out what the user says")
        self.wrap = self._around_an_image(specials)

    def _around_an_image(self, specials: Collection[str]) -> tuple[str, str] | None:
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        try:
            written = self._render([{"role": "user", "content": content}])
        except Unsupported:
            return None
        # The longest special token on each side: one token may end with another.
        before, _, after = written.partition(IMAGE_PLACEHOLDER)
        left = max((token for token in specials if before.endswith(token)), key=len, default=None)
        right = max((token for token in specials if after.startswith(token)), key=len, default=None)
        return None if left is None or right is None else (left, right)

    def raw(self, turns: Sequence[Turn], *, generate: bool = False, images: int = 0) -> str:
        """Return what the template writes, without the tokens around pictures.

        generate: ask for the beginning of an answer at the end. images: to show in the first question, before
        its text, if contents are lists of parts.
        """
        messages: list[dict[str, Any]] = []
        for role, text in turns:
            content: Any = text
            if self.parts:
                content = [{"type": "text", "text": text}]
                if role == "user":
                    content = [{"type": "image"}] * images + content
                    images = 0
            messages.append({"role": role, "content": content})
        return self._unwrapped(self._render(messages, generate))

    def _unwrapped(self, text: str) -> str:
        if self.wrap is not None:
            text = text.replace(IMAGE_PLACEHOLDER.join(self.wrap), IMAGE_PLACEHOLDER)
        return text

    def called(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        """Return what the template writes of a conversation with functions, up to the next answer."""
        if self.parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return self._render(list(messages), True, tools=list(tools)).removeprefix(self.bos)

    def _render(self, messages: list[dict[str, Any]], generate: bool = False, **more: Any) -> str:
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=generate,
                enable_thinking=False,
                **self._tokens,
                **more,
            )
        except Exception as error:  # untrusted code may raise anything
            reason = " ".join(str(error)[:200].split()) or type(error).__name__
            raise Unsupported(f"it fails: {reason}") from error
        if len(text) > _LONGEST:
            raise Unsupported(f"it writes {len(text)} characters for a few short messages")
        return text

    def write(self, turns: Sequence[Turn], *, generate: bool = False, images: int = 0) -> str:
        """Return what the template writes after the begin-of-text token."""
        return self.raw(turns, generate=generate, images=images).removeprefix(self.bos)

    def pictured(self, text: str, images: int = 1) -> str:
        """Return what it writes for a question with pictures before its text; "" if it takes none."""
        try:
            content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
            written = self._render([{"role": "user", "content": content}])
        except Unsupported:
            return ""
        return self._unwrapped(written).removeprefix(self.bos)

    def gaps(self, *turns: Turn, generate: bool = False) -> list[str]:
        """Return what the template writes before, between and after the texts of the turns."""
        remaining, gaps = self.write(turns, generate=generate), []
        for role, text in turns:
            before, match, remaining = remaining.partition(text)
            if not match:
                raise Unsupported(f"it leaves out or moves the {role}'s text")
            gaps.append(before)
        return [*gaps, remaining]


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Do transformers' filter `tojson`, which escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
