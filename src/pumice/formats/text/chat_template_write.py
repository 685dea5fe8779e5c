"""Write a ChatFormat as a Jinja chat template of transformers."""

from __future__ import annotations

from pumice.conversation import IMAGE_PLACEHOLDER
from pumice.templates import CALL, RESULT, Plain, Template

_Value = str | bool | tuple[str, ...] | None


def to_jinja(template: Template | Plain, wrap: tuple[str, str] | None = None) -> str:
    """Return a chat template for transformers that writes what `template` does.

    A message's content may be text, or a list of {"type": "image"} and {"type": "text", "text": ...}; a
    picture becomes `<image>`, with `wrap` around it. The template does not write the begin-of-text token: the
    tokenizer puts it before everything.
    """
    macro = _SAID if wrap is None else _SAID.replace(_IMAGE, quoted(wrap[0] + IMAGE_PLACEHOLDER + wrap[1]))
    if isinstance(template, Plain):
        return (
            macro + "{% for message in messages %}{% if message['content'] is not string %}"
            "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            "{{ said([part], false) }}{% endif %}{% endfor %}{% endif %}"
            "{% if message['role'] == 'assistant' %}"
            "{{ said(message['content'], false) + " + quoted(template.stop) + " }}{% endif %}{% endfor %}"
        )
    # The texts become Jinja variables, so that _TURNS is the same for every format.
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
        "text_first": chat.text_first,
        "line": "\n" if chat.image_line else "",
    }
    if chat.tools is not None:
        fields |= {"tools_around": chat.tools, "call": CALL, "result": RESULT}
    sets = "".join("{% set " + name + " = " + quoted(value) + " %}" for name, value in fields.items())
    return sets + macro + _SYSTEM + ("" if chat.tools is None else _TOOLS) + _TURNS


_IMAGE = f"'{IMAGE_PLACEHOLDER}'"
# The content of a message. Each picture at its front has its own line, as in `templates._content`.
_SAID = (
    "{% macro said(content, trim) %}{% if content is string %}"
    "{{ content.strip() if trim else content }}{% else %}{% set at = namespace(front=true) %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% if at.front and not loop.last %}{{ line }}{% endif %}"
    "{% else %}{% set text = part['text'] %}"
    "{% if trim and loop.first %}{% set text = text.lstrip() %}{% endif %}"
    "{% if trim and loop.last %}{% set text = text.rstrip() %}{% endif %}"
    "{{ text.lstrip(line) if at.front and not loop.first and line else text }}{% set at.front = false %}"
    "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
# The system message and the turns of a conversation, as in `templates.Template.render`.
_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% if around is none %}"
    "{{ raise_exception('this chat format has no place for a system message') }}{% endif %}"
    "{% set system = said(messages[0]['content'], 'system' in trim) %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = default %}{% set turns = messages %}{% endif %}"
)
# Functions follow the system message; calls are text of an answer, and what they gave is a question.
_TOOLS = (
    "{% set all = namespace(lines=[], turns=[], role='', text='') %}"
    "{% for tool in tools or [] %}{% set all.lines = all.lines + [tool | tojson] %}{% endfor %}"
    "{% if all.lines %}{% set system = (system + '\\n\\n' if system else '') + tools_around[0] "
    "+ all.lines | join('\\n') + tools_around[1] %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'tool' %}"
    "{% set all.text = result[0] + said(message['content'] or '', false) + result[1] %}"
    "{% if all.role == 'tool' %}{% set all.text = all.turns[-1]['content'] + '\\n' + all.text %}"
    "{% set all.turns = all.turns[:-1] %}{% endif %}"
    "{% set all.turns = all.turns + [{'role': 'user', 'content': all.text}] %}"
    "{% elif message['tool_calls'] %}{% set all.text = said(message['content'] or '', false) %}"
    "{% for one in message['tool_calls'] %}{% set function = one['function'] or one %}"
    "{% set given = function['arguments'] %}"
    "{% set all.text = all.text + ('\\n' if all.text else '') + call[0] + '{\"name\": \"' + function['name'] "
    "+ '\", \"arguments\": ' + (given if given is string else given | tojson) + '}' + call[1] %}{% endfor %}"
    "{% set all.turns = all.turns + [{'role': message['role'], 'content': all.text}] %}"
    "{% else %}{% set all.turns = all.turns + [message] %}{% endif %}"
    "{% set all.role = message['role'] %}{% endfor %}{% set turns = all.turns %}"
)
_TURNS = (
    "{% set head = around[0] + system + around[1] if system is not none else '' %}"
    "{% if not inside %}{{ head }}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ user[0] }}{% if inside and loop.first %}{{ head }}{% endif %}"
    "{% if message['content'] is string or message['content'][0]['type'] == 'text' %}"
    "{{ text_first }}{% endif %}"
    "{{ said(message['content'], 'user' in trim) + user[1] }}"
    "{% else %}{% set opens = assistant + (opening if loop.last else '') + answer[0] %}"
    "{% set text = said(message['content'], 'assistant' in trim) %}"
    "{{ opens + (text.lstrip() if (user[1] + opens).endswith('\\n') else text) + answer[1] }}"
    "{% if loop.last or not stop_once %}{{ stop }}{% endif %}"
    "{% if not loop.last %}{{ between }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ assistant + opening }}{% endif %}"
)


def quoted(value: _Value) -> str:
    """Return a value as Jinja source text."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(quoted, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
    return str(value).lower()
