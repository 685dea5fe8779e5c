"""Chat templates: read into fixed texts, and written from them, both equal to what Jinja writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pumice.config import ChatFormat, DecoderConfig, ModelConfig
from pumice.conversation import Conversation, ImagePart, Message
from pumice.errors import InputError
from pumice.formats.text.chat_template import Described, describe, image_wrap
from pumice.formats.text.chat_template_write import to_jinja
from pumice.templates import OWN, TEMPLATES, Plain, Template, get_template

SPECIALS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
ASK = "{% if add_generation_prompt %}"
IM = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
IM_ASK = ASK + "<|im_start|>assistant\n{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
TEXTS = "{% for p in m.content if p.type == 'text' %}"
PICTURES = "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"


SMOLLM2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe Smol.<|im_end|>\n{% endif %}" + IM + IM_ASK
)
HEADER = "<|start_header_id|>%s<|end_header_id|>\n\n"
HEADERS = HEADER % "{{ m.role }}" + "{{ m.content | trim }}<|eot_id|>"
LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}" + HEADERS + "{% endfor %}"
    + ASK + HEADER % "assistant" + "{% endif %}"
)  # fmt: skip
LLAMA_3_2 = (  # a date, which transformers hands in and we do not; a system block even when it is empty
    "{{ bos_token }}{% set date = strftime_now('%d %b') if strftime_now is defined else '26 Jul 2024' %}"
    "{% set has = messages[0].role == 'system' %}{% set rest = messages[1:] if has else messages %}"
    + HEADER % "system" + "Today Date: {{ date }}\n\n{{ messages[0].content | trim if has }}<|eot_id|>"
    + "{% for m in rest %}" + HEADERS + "{% endfor %}" + ASK + HEADER % "assistant" + "{% endif %}"
)  # fmt: skip
QWEN_3 = (  # an empty thought before the newest answer, none before earlier ones
    "{% set thought = '<think>\n\n</think>\n\n' %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ thought if loop.last and m.role == 'assistant' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    + ASK + "<|im_start|>assistant\n{{ thought if enable_thinking is false }}{% endif %}"
)  # fmt: skip
MISTRAL = (  # v0.2
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM = (  # later: the system message in the first question
    "{% set has = messages[0].role == 'system' %}{% set rest = messages[1:] if has else messages %}"
    "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ ' [INST] ' + (messages[0].content + '\n\n' if loop.first and has else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_LAST = MISTRAL_SYSTEM.replace("loop.first", "loop.last").replace(
    "content + eos", "content | trim + eos"
)
GEMMA = (
    NO_SYSTEM + "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    + ASK + "<start_of_turn>model\n{% endif %}"
)  # fmt: skip
PHI_3 = (  # the question's end opens the answer
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
LLAVA_1_5 = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}" + PICTURES + TEXTS
    + "{% generation %}{{ p.text + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
    + ASK + "ASSISTANT:{% endif %}"
)  # fmt: skip
LLAVA_1_6 = (
    "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>\n{{ m.content[0].text }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}[INST] " + PICTURES + TEXTS + "{{ p.text }}{% endfor %} [/INST]"
    "{% else %} {{ m.content[0].text }}</s> {% endif %}{% endfor %}"
)
# Of llava-hf's LLaVA-OneVision; LLaVA-Interleave's has no videos. Pictures have one line together. A blank
# stands before the line end of a complete answer, and none where the model goes on.
LLAVA_QWEN2 = (
    "{% for m in messages %}<|im_start|>{{ m.role + ' ' }}"
    "{% for p in m.content if p.type == 'image' %}<image>{% endfor %}"
    "{% for p in m.content if p.type == 'video' %}<video>{% endfor %}"
    + TEXTS + "{{ '\n' + p.text }}{% endfor %}<|im_end|>{% endfor %}"
    + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
OWN_FORMATS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "SmolLM2": (SMOLLM2, {"default_system": "Be Smol.", "stop": "<|im_end|>"}, False),
    "Llama-3": (
        LLAMA_3,
        {"stop": "<|eot_id|>", "trim": ("system", "user", "assistant"), "default_system": None},
        True,
    ),
    "Llama-3.2": (
        LLAMA_3_2,
        {"default_system": "", "system": (HEADER % "system" + "Today Date: 26 Jul 2024\n\n", "<|eot_id|>")},
        True,
    ),
    "Qwen3": (QWEN_3, {"opening": "<think>\n\n</think>\n\n", "assistant": "<|im_start|>assistant\n"}, False),
    "Mistral": (
        MISTRAL,
        {"user": ("[INST] ", " [/INST]"), "answer": ("", ""), "stop": "</s>", "system": None},
        True,
    ),
    "Mistral with a system message": (
        MISTRAL_SYSTEM,
        {"user": (" [INST] ", " [/INST]"), "answer": (" ", ""), "system": ("", "\n\n"),
         "system_in_user": True},
        True,
    ),
    "Mistral with it in the last question": (MISTRAL_LAST, {"system": None, "trim": ("assistant",)}, True),
    "Gemma": (GEMMA, {"stop": "<end_of_turn>", "between": "\n", "system": None}, True),
    "Phi-3": (PHI_3, {"user": ("<|user|>\n", "<|end|>\n<|assistant|>\n"), "assistant": ""}, True),
    "LLaVA-1.5": (
        LLAVA_1_5,
        {"user": ("USER: ", " "), "assistant": "ASSISTANT:", "answer": (" ", ""), "stop": "</s>",
         "stop_once": True, "between": " ", "specials": ("</s>",)},
        False,
    ),
    "LLaVA-1.6": (
        LLAVA_1_6,
        {"system": ("<<SYS>>\n", "\n<</SYS>>\n\n"), "answer": (" ", ""), "stop": "</s>", "between": " ",
         "stop_once": False, "shared_line": False},
        False,
    ),
    "LLaVA-OneVision": (
        LLAVA_QWEN2,
        {"user": ("<|im_start|>user ", "<|im_end|>"), "text_first": "\n", "image_line": True,
         "shared_line": True, "assistant": "<|im_start|>assistant\n",
         "earlier": "<|im_start|>assistant \n", "system": ("<|im_start|>system \n", "<|im_end|>")},
        False,
    ),
}  # fmt: skip


def describe_template(source: str) -> Described:
    return describe(source, bos="<s>", eos="</s>", specials=SPECIALS)


def template_of(described: Described) -> Template:
    template = get_template(described.template, described.chat)
    assert isinstance(template, Template)
    return template


@pytest.mark.parametrize("name", OWN_FORMATS)
def test_formats_of_known_families(name: str) -> None:
    source, expected, writes_bos = OWN_FORMATS[name]
    described = describe_template(source)
    assert (described.template, described.writes_bos) == (OWN, writes_bos)
    assert described.chat is not None
    assert {key: getattr(described.chat, key) for key in expected} == expected


@pytest.mark.parametrize("name", OWN_FORMATS)
def test_a_format_survives_config_json_and_export(name: str) -> None:
    template = template_of(describe_template(OWN_FORMATS[name][0]))
    decoder = DecoderConfig(vocab_size=8, width=8, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8)
    config = ModelConfig(decoder=decoder, template=OWN, chat=template.chat)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert get_template(again.template, again.chat) == template
    exported = template_of(describe_template(to_jinja(template)))
    for turns in CHATS:
        for generate in (False, True):
            assert render_template(exported, turns, generate) == render_template(template, turns, generate)


@pytest.mark.parametrize("name", [n for n, t in TEMPLATES.items() if isinstance(t, Template)])
def test_a_known_format_is_known_by_what_it_writes(name: str) -> None:
    described = describe_template(to_jinja(TEMPLATES[name]))
    assert (described.chat, described.writes_bos) == (None, False)
    assert template_of(described).chat == template_of(Described(name, None, False)).chat


def test_a_template_that_takes_one_picture_alone() -> None:
    pictures = "{% for p in m.content if p.type == 'image' %}"
    refused = "{% if not loop.first %}{{ raise_exception('one picture') }}{% endif %}"
    chat = describe_template(LLAVA_1_6.replace(pictures, pictures + refused)).chat
    assert chat == describe_template(LLAVA_1_6).chat


def test_chatml_under_other_wording() -> None:
    assert describe_template(IM + IM_ASK) == Described("chatml", None, False)
    assert describe_template("{{ bos_token }}" + IM + IM_ASK) == Described("chatml", None, True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}", "it is not Jinja: Unexpected end of template"),
        ("{{ messages.foo.bar }}", "it fails: 'list object' has no attribute 'foo'"),
        ("{{ ''.__class__.__mro__ }}" + IM, "it fails: access to attribute '__class__' of 'str' object is"),
        ("Hello", "it leaves out what the user says"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "it leaves out what the user says"),
        (
            "{% for m in messages %}{{ loop.index }} {{ m.content }}</s>{% endfor %}",
            "its questions do not all",
        ),
        (IM + "<|im_start|>assistant\n", "earlier answers and the newest one end differently"),
        (IM + ASK + "Bot:{% endif %}", "earlier answers and the newest one begin differently"),
        (LLAVA_1_5.replace("<image>\n", "<image>--"), "after 'USER: <image>' it writes"),
        # The second of two pictures.
        (LLAVA_1_5.replace("<image>\n", "<image>{{ loop.index }}\n"), "after 'USER: <image>' it writes"),
        (
            LLAVA_1_5.replace("<image>\n", "{{ '' if loop.first else '--' }}<image>\n"),
            r"after 'USER: <image>\\n' it writes '--<image>",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '!' if loop.last else '?' }}</s>{% endfor %}",
            "a question is not followed by the same text everywhere",
        ),
    ],
)
def test_what_is_no_format_is_refused_in_a_sentence(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"^this chat template .*{reason}") as refusal:
        describe_template(source)
    assert "name the format with --template, one of: plain, chatml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


# To Jinja: what we write for others is what we write ourselves.

CHATS: list[list[tuple[str, str]]] = [
    [("user", "Q")],
    [("user", "Q"), ("assistant", "A")],
    [("user", " Q\n"), ("assistant", "A 'b' \\n {{ c }}"), ("user", "é🙂")],
    [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B ")],
]


def written(source: str, messages: list[dict[str, Any]], generate: bool, **more: Any) -> str:
    """As transformers renders a chat template."""
    return compiled(source).render(messages=messages, add_generation_prompt=generate, **more)


@lru_cache
def compiled(source: str) -> jinja2.Template:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


def rendered(template: Template | Plain, conversation: Conversation, generate: bool) -> str:
    spans = template.render(conversation, generate=generate)
    return "".join("<image>" if isinstance(span, ImagePart) else span.text for span in spans)


def render_template(template: Template | Plain, turns: Sequence[tuple[str, str]], generate: bool) -> str:
    return rendered(template, Conversation(tuple(Message(role, (text,)) for role, text in turns)), generate)


ODD = ChatFormat(
    user=("'q'\\", "\n"), assistant="{{ a }}", stop="%}", answer=("{% ", "\t"), between="é🙂\n",
    system=("\n", "#}"), default_system="{# d #}", opening="\\n", stop_once=True,
    trim=("system", "user", "assistant"),
)  # fmt: skip
WRITTEN = TEMPLATES | {
    name: template_of(describe_template(source)) for name, (source, *_) in OWN_FORMATS.items()
}
WRITTEN["odd"] = Template(OWN, ODD)
odd = st.sampled_from([" ", "\n", "x", "{{", "'", "<image>", "é"])
texts = st.lists(odd | st.text(max_size=3), max_size=5).map("".join)
parts = st.lists(st.just(None) | texts, min_size=1, max_size=4)


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=40)
@given(data=st.data())
def test_jinja_writes_what_we_do(name: str, data: st.DataObject) -> None:
    """Texts as they are, and lists of parts with pictures (None) among them."""
    template = WRITTEN[name]
    length = data.draw(st.integers(1, 5))
    messages, turns = [], []
    has_system = isinstance(template, Plain) or template.chat.system is not None
    roles = ["system"] * data.draw(st.integers(0, has_system)) + ["user", "assistant"] * 3
    for role in roles[:length]:
        content: Any = data.draw(texts)
        message_parts: tuple[Any, ...] = (content,)
        if data.draw(st.booleans()):
            chosen = data.draw(parts) if role == "user" else [data.draw(texts)]
            content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in chosen]
            message_parts = tuple(ImagePart("x") if p is None else p for p in chosen)
        messages.append({"role": role, "content": content})
        turns.append(Message(role, message_parts))
    generate = turns[-1].role == "user"
    own_prompt = rendered(template, Conversation(tuple(turns)), generate)
    assert written(to_jinja(template), messages, generate) == own_prompt


@pytest.mark.parametrize("name", ["v1", "plain"])
def test_what_stands_around_a_picture_is_written_and_read(name: str) -> None:
    wrap = ("<im_start>", "<im_end>")
    source = to_jinja(TEMPLATES[name], wrap)
    shown = [{"type": "image"}, {"type": "text", "text": "Q"}, {"type": "image"}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": "A"}]
    alone = written(to_jinja(TEMPLATES[name]), messages, False)
    assert alone.count("<image>") == 2
    assert written(source, messages, False) == alone.replace("<image>", "<im_start><image><im_end>")
    for text, expected in ((source, wrap), (to_jinja(TEMPLATES[name]), None)):
        found_wrap = image_wrap(
            text, bos="<s>", eos="</s>", specials=["<s>", "</s>", "<im_start>", "<im_end>"]
        )
        assert found_wrap == (expected if name == "v1" else None)  # plain has no question to be known by


def test_parts_with_marks_around_a_picture_are_a_known_format() -> None:
    """A template that takes lists of parts only, as those of newer LLaVAs."""
    source = to_jinja(TEMPLATES["v1"], ("<im_start>", "<im_end>")).replace(
        "{% if content is string %}", "{% if content is string %}{{ raise_exception('parts') }}"
    )
    specials = ["<s>", "</s>", "<im_start>", "<im_end>"]
    assert describe(source, bos="<s>", eos="</s>", specials=specials).template == "v1"


def test_a_format_without_a_system_message_says_so() -> None:
    source = to_jinja(Template(OWN, ChatFormat(user=("", ""), assistant="", stop="")))
    with pytest.raises(jinja2.TemplateError, match="no place for a system message"):
        written(source, [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], True)


# Of Qwen2.5 and Qwen3, with shorter words.
KNOW_TOOLS = sorted((Path(__file__).parents[2] / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", KNOW_TOOLS, ids=lambda path: path.name)
def test_functions_calls_and_results(path: Path) -> None:
    """What is read of a template writes conversations with functions as it does, in Jinja too."""
    source = path.read_text()
    template = template_of(describe_template(source))
    assert template.chat.tools is not None
    assert template.chat.tools[0].startswith("# Tools\n\n")
    assert template_of(describe_template(to_jinja(template))).chat.tools == template.chat.tools
    tools = [{"type": "function", "function": {"name": name, "description": "é<"}} for name in ("a", "b")]
    call = {"type": "function", "function": {"name": "a", "arguments": {"x": "é"}}}
    given = {"role": "tool", "content": "<b>ok</b>"}
    hi = {"role": "user", "content": "hi"}
    messages: list[dict[str, Any]] = [{"role": "system", "content": "S"}, hi]
    messages += [{"role": "assistant", "content": "T", "tool_calls": [call, call]}, given, given]
    messages += [{"role": "assistant", "content": "", "tool_calls": [call]}, given]
    for shown in (messages, messages[1:], [*messages, {"role": "assistant", "content": "U"}, hi]):
        expected = written(source, shown, True, tools=tools)
        assert written(to_jinja(template), shown, True, tools=tools) == expected
        assert written(to_jinja(template), shown, True) == written(source, shown, True)
    assert '{"name": "a", "arguments": {"x": "é"}}\n</tool_call>' in expected
    assert "</tool_response>\n<tool_response>" in expected


@pytest.mark.parametrize(
    ("mark", "other"),
    [("<tool_call>", "<call>"), ("<tool_response>", "<result>"), ("| tojson", "| string")],
)
def test_another_form_of_calls_is_no_form(mark: str, other: str) -> None:
    assert template_of(describe_template(KNOW_TOOLS[0].read_text().replace(mark, other))).chat.tools is None
