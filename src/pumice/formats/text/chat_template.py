"""Chat templates in Jinja, as transformers keeps them: read into a ChatFormat, and written from one.

Knows: what transformers hands to such a template, and how a format shows in what it writes. Does not
know: tokens, files. A template is a stranger's code: it runs in Jinja's sandbox, once, when a model is
imported, and what it was found to write is checked; afterwards only the format's fixed texts are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pumice.config import ChatFormat
from pumice.conversation import IMAGE_PLACEHOLDER, Conversation, ImagePart, Message
from pumice.errors import InputError
from pumice.templates import OWN, TEMPLATES, Plain, Template

_Turn = tuple[str, str]  # role, text
_Value = str | bool | tuple[str, ...] | None
_SYSTEM = ("system", "textofsystem")
_QUESTIONS = [("user", f"text{n}ofuser") for n in ("one", "two", "three")]
_ANSWERS = [("assistant", f"text{n}ofassistant") for n in ("one", "two")]
_ODD = " Two\n\nlines, {{ braces }} & 'quotes' <b> é🙂 "


@dataclass(frozen=True)
class Described:
    """A format under its name in `pumice.templates`, or "own" with its texts.

    writes_bos: it writes the begin-of-text token itself, once, before everything.
    """

    template: str
    chat: ChatFormat | None
    writes_bos: bool


class _Unlike(Exception):
    """A template writes something that no ChatFormat does."""


def describe(
    source: str, *, bos: str | None, eos: str | None, specials: Collection[str], where: str
) -> Described:
    """The format that a chat template writes, checked on conversations of every shape.

    bos, eos: tokens that the template may write. specials: all special tokens of the tokenizer. Raises
    InputError when the template fails, or writes what a ChatFormat cannot; `where` names it.
    """
    known = list(dict.fromkeys([*specials, *filter(None, (bos, eos))]))
    try:
        jinja = _Jinja(source, bos, eos, known)
        writes_bos = bool(bos) and jinja.raw([_QUESTIONS[0]]).startswith(bos or "")
        for name, template in TEMPLATES.items():
            if isinstance(template, Template) and not _difference(template, jinja):
                return Described(name, None, writes_bos)
        reasons = []
        for chat in _candidates(jinja, known, eos):
            if not (reason := _difference(Template(OWN, chat), jinja)):
                return Described(OWN, chat, writes_bos)
            reasons.append(reason)
        raise _Unlike(reasons[0] if reasons else "its questions do not all begin with the same text")
    except _Unlike as error:
        raise InputError(
            f"{where}: this chat template cannot be turned into fixed texts around each turn ({error}); "
            f"name the format with --template, one of: {', '.join(TEMPLATES)}"
        ) from error


def image_wrap(
    source: str, *, bos: str | None, eos: str | None, specials: Collection[str]
) -> tuple[str, str] | None:
    """The special tokens that a chat template writes around each picture, as LLaVA 1.0 has them."""
    try:
        return _Jinja(source, bos, eos, specials).wrap
    except _Unlike:
        return None  # `describe` says so, where the template is needed


def to_jinja(template: Template | Plain, wrap: tuple[str, str] | None = None) -> str:
    """A chat template for transformers that writes what `template` does.

    Contents may be texts, or lists of {"type": "image"} and {"type": "text", "text": ...}; a picture
    becomes `<image>`, with `wrap` around it. The begin-of-text token is left to the tokenizer, which puts it
    before everything.
    """
    said = _SAID if wrap is None else _SAID.replace(_IMAGE, quoted(wrap[0] + IMAGE_PLACEHOLDER + wrap[1]))
    if isinstance(template, Plain):
        return (
            said + "{% for message in messages %}{% if message['content'] is not string %}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            "{{ said([part], false) }}{% endif %}{% endfor %}{% endif %}"
            "{% if message['role'] == 'assistant' %}"
            "{{ said(message['content'], false) + " + quoted(template.stop) + " }}{% endif %}{% endfor %}"
        )
    chat = template.chat
    fields: dict[str, _Value] = {
        "user": chat.user,
        "assistant": chat.assistant,
        "opening": chat.opening,
        "answer": chat.answer,
        "stop": chat.stop,
        "stop_once": chat.stop_once,
        "between": chat.between,
        "around": chat.system,
        "default": chat.default_system,
        "inside": chat.system_in_user,
        "trim": chat.trim,
    }
    sets = "".join("{% set " + name + " = " + quoted(value) + " %}" for name, value in fields.items())
    return sets + said + _TURNS


_IMAGE = f"'{IMAGE_PLACEHOLDER}'"
# What a message says, pictures at its front each on a line of their own: `templates._content`.
_SAID = (
    "{% macro said(content, trim) %}{% if content is string %}"
    "{{ content.strip() if trim else content }}{% else %}{% set at = namespace(front=true) %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% if at.front and not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{% set text = part['text'] %}"
    "{% if trim and loop.first %}{% set text = text.lstrip() %}{% endif %}"
    "{% if trim and loop.last %}{% set text = text.rstrip() %}{% endif %}"
    "{{ text.lstrip('\\n') if at.front and not loop.first else text }}{% set at.front = false %}"
    "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
# `templates.Template.render`.
_TURNS = (
    "{% if messages[0]['role'] == 'system' %}{% if around is none %}"
    "{{ raise_exception('this chat format has no place for a system message') }}{% endif %}"
    "{% set system = said(messages[0]['content'], 'system' in trim) %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = default %}{% set turns = messages %}{% endif %}"
    "{% set head = around[0] + system + around[1] if system is not none else '' %}"
    "{% if not inside %}{{ head }}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ user[0] }}{% if inside and loop.first %}{{ head }}{% endif %}"
    "{{ said(message['content'], 'user' in trim) + user[1] }}"
    "{% else %}{% set opens = assistant + (opening if loop.last else '') + answer[0] %}"
    "{% set text = said(message['content'], 'assistant' in trim) %}"
    "{{ opens + (text.lstrip() if (user[1] + opens).endswith('\\n') else text) + answer[1] }}"
    "{% if loop.last or not stop_once %}{{ stop }}{% endif %}"
    "{% if not loop.last %}{{ between }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ assistant + opening }}{% endif %}"
)


def quoted(value: _Value) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(quoted, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    return str(value).lower()


class _Jinja:
    """A chat template as transformers runs it."""

    def __init__(self, source: str, bos: str | None, eos: str | None, specials: Collection[str]) -> None:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class GenerationTag(Extension):
            """{% generation %}: transformers' mark around what the model writes; it adds no text."""

            def __init__(self, environment: Any) -> None:
                super().__init__(environment)
                self.tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )
        environment.globals["raise_exception"] = refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise _Unlike(f"it is not Jinja: {error}") from error
        self._tokens = {"bos_token": bos or "", "eos_token": eos or ""}
        self.bos = bos or ""
        self.parts = False  # whether a content is a list of parts
        self.wrap: tuple[str, str] | None = None  # what stands around a picture
        try:
            whole = _QUESTIONS[0][1] in self.raw([_QUESTIONS[0]])
        except _Unlike:
            whole = False
        if not whole:
            self.parts = True
            if _QUESTIONS[0][1] not in self.raw([_QUESTIONS[0]]):
                raise _Unlike("it leaves out what the user says")
        self.wrap = self._around_a_picture(specials)

    def _around_a_picture(self, specials: Collection[str]) -> tuple[str, str] | None:
        content = [{"type": "image"}, {"type": "text", "text": "?"}]
        try:
            written = self._render([{"role": "user", "content": content}])
        except _Unlike:
            return None
        before, _, after = written.partition(IMAGE_PLACEHOLDER)
        left = max((token for token in specials if before.endswith(token)), key=len, default=None)
        right = max((token for token in specials if after.startswith(token)), key=len, default=None)
        return None if left is None or right is None else (left, right)

    def raw(self, turns: Sequence[_Turn], *, generate: bool = False, image: bool = False) -> str:
        """What the template writes, without what it puts around pictures.

        image: the first question shows a picture, for a list of parts only.
        """
        messages: list[dict[str, Any]] = []
        for role, text in turns:
            content: Any = text
            if self.parts:
                content = [{"type": "text", "text": text}]
                if role == "user" and image:
                    content.insert(0, {"type": "image"})
                    image = False
            messages.append({"role": role, "content": content})
        text = self._render(messages, generate)
        if self.wrap is not None:
            text = text.replace(IMAGE_PLACEHOLDER.join(self.wrap), IMAGE_PLACEHOLDER)
        return text

    def _render(self, messages: list[dict[str, Any]], generate: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=generate, enable_thinking=False, **self._tokens
            )
        except Exception as error:  # a stranger's code may raise anything
            raise _Unlike(f"it fails: {' '.join(str(error).split())}") from error

    def write(self, turns: Sequence[_Turn], *, generate: bool = False, image: bool = False) -> str:
        """What it writes after the begin-of-text token."""
        return self.raw(turns, generate=generate, image=image).removeprefix(self.bos)

    def gaps(self, *turns: _Turn, generate: bool = False) -> list[str]:
        """What it writes before, between and after the turns' texts."""
        rest, found = self.write(turns, generate=generate), []
        for role, text in turns:
            before, met, rest = rest.partition(text)
            if not met:
                raise _Unlike(f"it leaves out or moves what the {role} says")
            found.append(before)
        return [*found, rest]


def _candidates(jinja: _Jinja, specials: list[str], eos: str | None) -> Iterator[ChatFormat]:
    """Formats that would explain what the template writes: a system message before the questions, one
    inside the first question, none at all."""
    one, two, three = _QUESTIONS
    shapes: list[tuple[str, bool, tuple[str, str]]]  # a question's beginning, system_in_user, system
    head, opens, gap, *_ = jinja.gaps(one, _ANSWERS[0], two, _ANSWERS[1], three, generate=True)
    asked, end = jinja.gaps(one)[-1], jinja.gaps(one, _ANSWERS[0])[-1]
    prompt = jinja.gaps(one, generate=True)[-1]
    if not (prompt.startswith(asked) and opens.startswith(asked)):
        raise _Unlike("a question is not followed by the same text everywhere")
    newest, earlier = prompt[len(asked) :], opens[len(asked) :]
    if not (earlier.startswith(newest) or newest.startswith(earlier)):
        raise _Unlike("earlier answers and the newest one begin differently")
    before_stop, stop, after_stop, once = _stop(end, specials, eos)
    if gap.startswith(end):
        tail = gap[len(end) :]
    elif gap.startswith(before_stop) and not after_stop:
        tail, once = gap[len(before_stop) :], True
    else:
        raise _Unlike("earlier answers and the newest one end differently")
    base = ChatFormat(
        user=("", asked),
        assistant=min(newest, earlier, key=len),
        opening=newest[len(earlier) :],
        answer=(earlier[len(newest) :], before_stop),
        stop=stop,
        stop_once=once,
        trim=tuple(role for role in ("system", "user", "assistant") if _trims(jinja, role)),
    )

    def complete(question: str, **more: Any) -> ChatFormat:
        between = after_stop + tail[: len(tail) - len(question)]
        chat = replace(base, user=(question, asked), between=between, **more)
        texts = [*chat.user, chat.assistant, chat.stop, between, *chat.answer, chat.opening]
        texts += [*(chat.system or ()), chat.default_system or ""]
        return replace(chat, specials=tuple(s for s in specials if any(s in text for text in texts)))

    try:
        before, after, _ = jinja.gaps(_SYSTEM, one)
    except _Unlike:
        shapes = []
    else:
        question = _common(tail[::-1], after[::-1], head[::-1])[::-1]
        shapes = [(question, False, (before, after[: len(after) - len(question)]))]
        # Inside the first question: the longest end of `tail` with which both others begin.
        ends = (tail[cut:] for cut in range(len(tail) + 1))
        question = next(end for end in ends if before.startswith(end) and head.startswith(end))
        shapes.append((question, True, (before[len(question) :], after)))
    for question, inside, around in shapes:
        default = None
        if head != question:
            if len(head) < len(before + after) or not (head.startswith(before) and head.endswith(after)):
                continue
            default = head[len(before) : len(head) - len(after)]
        yield complete(question, system=around, system_in_user=inside, default_system=default)
    if tail.endswith(head):
        yield complete(head)


def _common(*texts: str) -> str:
    """What all of them begin with."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _stop(end: str, specials: list[str], eos: str | None) -> tuple[str, str, str, bool]:
    """What follows an answer: (before its stop, the stop, after it, only the newest answer has it)."""
    found = [(end.index(token), -len(token), token) for token in specials if token in end]
    stop = min(found)[2] if found else end.strip()
    if stop:
        before, _, after = end.partition(stop)
        return before, stop, after, False
    if eos is None:
        raise _Unlike("nothing says where an answer ends")
    return "", eos, end, True


def _trims(jinja: _Jinja, role: str) -> bool:
    """Whether the blanks around a role's text are dropped."""
    shapes: dict[str, Callable[[str], list[_Turn]]] = {
        "system": lambda text: [("system", text), _QUESTIONS[0]],
        "user": lambda text: [("user", text)],
        "assistant": lambda text: [_QUESTIONS[0], ("assistant", text), _QUESTIONS[1]],
    }
    try:
        written = jinja.write(shapes[role]("textpadded  "))
    except _Unlike:
        return False
    return "textpadded" in written and "textpadded  " not in written


def _difference(template: Template, jinja: _Jinja) -> str:
    """Where the two write differently, or "" when they agree on every probe."""
    chat = template.chat
    texts = [("one", "two", "three", "four"), (_ODD, "And \nthis? ", _ODD + "\n", "Last  ")]
    systems: list[str | None] = [None]
    try:
        jinja.gaps(_SYSTEM, _QUESTIONS[0])
        systems += ["Be brief.", _ODD] if chat.system is not None else []
    except _Unlike:
        pass  # it has no place for one, or puts it elsewhere
    for (a, b, c, d), system in itertools.product(texts, systems):
        turns = [("user", a), ("assistant", b), ("user", c), ("assistant", d), ("user", a)]
        first = [("system", system)] if system is not None else []
        for length, image in itertools.product(range(1, 6), {False, jinja.parts}):
            shown, generate = [*first, *turns[:length]], bool(length % 2)
            theirs = jinja.write(shown, generate=generate, image=image)
            ours = _written(template, shown, generate, image)
            alike = [ours]
            if not generate:
                # After the last answer some leave the stop out, some write what stands before a question.
                alike += [ours.removesuffix(chat.stop)] if chat.stop_once else []
                alike += [text + chat.between for text in alike]
            if theirs not in alike:
                at = len(_common(ours, theirs))
                return f"after {theirs[max(at - 20, 0) : at]!r} it writes {theirs[at : at + 20]!r}"
    return ""


def _written(template: Template, turns: Sequence[_Turn], generate: bool, image: bool) -> str:
    messages = []
    for role, text in turns:
        shows = image and role == "user"
        messages.append(Message(role, (ImagePart(IMAGE_PLACEHOLDER), text) if shows else (text,)))
        image = image and not shows
    spans = template.render(Conversation(tuple(messages)), generate=generate)
    return "".join(IMAGE_PLACEHOLDER if isinstance(span, ImagePart) else span.text for span in spans)
