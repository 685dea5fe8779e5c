"""Write a ChatFormat as a Jinja chat template of transformers."""

from __future__ import annotations

from pathlib import Path

from pumice.conversation import IMAGE_PLACEHOLDER
from pumice.templates import CALL, RESULT, Plain, Template

_Value = str | bool | tuple[str, ...] | None


def to_jinja(template: Template | Plain, wrap: tuple[str, str] | None = None) -> str:
    """Return a chat template for transformers that writes what `template` does.

    A message's content may be text, or a list of {"type": "image"} and {"type": "text", "text": ...}; a
    picture becomes `<image>`, with `wrap` around it. The template does not write the begin-of-text token: the
    tokenizer puts it before everything.
    """
    macro = jinja_part("said")
    if wrap is not None:
        macro = macro.replace(_IMAGE, quoted(wrap[0] + IMAGE_PLACEHOLDER + wrap[1]))
    if isinstance(template, Plain):
        return (
            macro + "{% for message in messages %}{% if message['content'] is not string %}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            "{{ said([part], false) }}{% endif %}{% endfor %}{% endif %}"
            "{% if message['role'] == 'assistant' %}"
            "{{ said(message['content'], false) + " + quoted(template.stop) + " }}{% endif %}{% endfor %}"
        )
    # The texts become Jinja variables, so that `turns` is the same for every format.
    chat = template.chat
    fields: dict[str, _Value] = {
        "user": chat.user,
        "assistant": chat.assistant,
        "earlier": chat.earlier or chat.assistant,
        "opening": chat.opening,
        "answer": chat.answer,
        "stop": chat.stop,
        "stop_once": chat.stop_once,
        "between": chat.between,
        "around": chat.system,
        "default": chat.default_system,
        "inside": chat.system_in_user,
        "trim": chat.trim,
        "text_first": chat.text_first,
        "line": "\n" if chat.image_line else "",
        "shared": chat.shared_line,
    }
    if chat.tools is not None:
        fields |= {"tools_around": chat.tools, "call": CALL, "result": RESULT}
    sets = "".join("{% set " + name + " = " + quoted(value) + " %}" for name, value in fields.items())
    tools = "" if chat.tools is None else jinja_part("tools")
    return sets + macro + jinja_part("system") + tools + jinja_part("turns")


_IMAGE = f"'{IMAGE_PLACEHOLDER}'"


def jinja_part(name: str) -> str:
    """Return a part of the chat templates, of a file in which line ends and indents are for readers alone.

    said: the content of a message; each picture at its front has its own line, as in `templates._content`.
    system, turns: the system message and the turns, as in `templates.Template.render`. tools: functions
    follow the system message; calls are text of an answer, and what they gave is a question.
    """
    text = (Path(__file__).parent / "chat_template_parts" / f"{name}.jinja").read_text(encoding="utf-8")
    return "".join(line.strip() for line in text.split("\n"))


def quoted(value: _Value) -> str:
    """Return a value as Jinja source text."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(quoted, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    return str(value).lower()
