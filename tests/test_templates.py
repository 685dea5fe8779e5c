"""Chat formats: exact wording, and which of it is learned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pumice.config import ChatFormat
from pumice.conversation import Conversation, ImagePart, Message, user_message
from pumice.errors import InputError
from pumice.templates import OWN, TEMPLATES, Plain, Span, Spans, Template, get_template

A, B = ImagePart("a"), ImagePart("b")


def answer(text: str) -> Message:
    return Message("assistant", (text,))


def written(spans: Spans) -> str:
    """Supervised text in ⟦⟧, pictures by their names in {}."""
    pieces = []
    for span in spans:
        if isinstance(span, ImagePart):
            pieces.append(f"{{{span.name}}}")
        else:
            pieces.append(f"⟦{span.text}⟧" if span.supervised else span.text)
    return "".join(pieces).replace("⟧⟦", "")


def test_chatml_word_for_word() -> None:
    conversation = Conversation((
        Message("system", ("Be brief.",)),
        user_message("What?", ["a"]), answer("A dog."),
        user_message("Sure?"), answer("Yes."),
    ))  # fmt: skip
    assert written(get_template("chatml").render(conversation)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n{a}\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n⟦A dog.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes.<|im_end|>⟧"
    )


def test_a_question_ends_where_the_answer_begins() -> None:
    conversation = Conversation((user_message("Hi"),))
    text = "<|im_start|>user\nHi<|im_end|>\n"
    assert written(get_template("chatml").render(conversation)) == text
    assert (
        written(get_template("chatml").render(conversation, generate=True))
        == text + "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((A, "What?"), "{a}\nWhat?"),
        ((A, B, "Both?"), "{a}\n{b}\nBoth?"),
        ((A, B, "\nBoth?"), "{a}\n{b}\nBoth?"),
        (("First ", A, " then ", B), "First {a} then {b}"),
        ((A, "and ", B, "?"), "{a}\nand {b}?"),
        ((A,), "{a}"),
        ((A, B), "{a}\n{b}"),
    ],
)
def test_leading_pictures_have_lines_of_their_own(parts: tuple[str | ImagePart, ...], text: str) -> None:
    spans = get_template("chatml").render(Conversation((Message("user", parts),)))
    assert written(spans) == f"<|im_start|>user\n{text}<|im_end|>\n"


def test_only_the_template_writes_control_spans() -> None:
    conversation = Conversation((user_message("<|im_end|>", ["a"]), answer("<|im_start|>")))
    spans = [s for s in get_template("chatml").render(conversation) if isinstance(s, Span)]
    assert [s for s in spans if not s.control] == [
        Span("\n"), Span("<|im_end|>"), Span("<|im_start|>", supervised=True),
    ]  # fmt: skip
    assert not any(s.supervised for s in spans if s.text not in ("<|im_start|>", "<|im_end|>"))


def test_an_answer_begins_with_its_first_word() -> None:
    """`\\n` + `\\n` is one token, but the model starts to answer after a single `\\n`."""
    spans = get_template("chatml").render(Conversation((user_message("Hi"), answer(" \n\tYes. \n"))))
    assert written(spans).endswith("assistant\n⟦Yes. \n<|im_end|>⟧")


def test_plain_is_pictures_caption_newline() -> None:
    conversation = Conversation((user_message("Describe the picture.", ["a"]), answer("A red bus.")))
    template = get_template("plain")
    assert written(template.render(conversation)) == "{a}⟦A red bus.\n⟧"
    assert written(template.render(Conversation(conversation.messages[:1]), generate=True)) == "{a}"


CHAT = Conversation((
    user_message("Q1", ["a"]), answer("A1"), user_message("Q2"), answer(" A2"),
))  # fmt: skip
VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
SEEING = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
# As haotian-liu/LLaVA's conversation.py writes them.
WORDING = {
    "v1": VICUNA.format("user") + " USER: {a}\nQ1 ASSISTANT:⟦ A1</s>⟧USER: Q2 ASSISTANT:⟦  A2</s>⟧",
    "llava_v1": VICUNA.format("human") + " USER: {a}\nQ1 ASSISTANT:⟦ A1</s>⟧USER: Q2 ASSISTANT:⟦  A2</s>⟧",
    "v0": VICUNA.format("human") + "###Human: {a}\nQ1###Assistant:⟦ A1###⟧Human: Q2###Assistant:⟦  A2###⟧",
    "llava_llama_2": f"[INST] <<SYS>>\n{SEEING}\n<</SYS>>\n\n"
    "{a}\nQ1 [/INST]⟦ A1 </s>⟧<s>[INST] Q2 [/INST]⟦  A2 </s>⟧",
    "mistral_instruct": "[INST] {a}\nQ1 [/INST]⟦ A1 </s>⟧[INST] Q2 [/INST]⟦  A2 </s>⟧",
    "mpt": "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.<|im_end|><|im_start|>user\n{a}\nQ1<|im_end|>"
    "<|im_start|>assistant\n⟦A1<|im_end|>⟧<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n⟦A2<|im_end|>⟧",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n{a}\nQ1<|im_end|>"
    "<|im_start|>assistant\n⟦A1<|im_end|>⟧<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n⟦A2<|im_end|>⟧",
}


@pytest.mark.parametrize("name", WORDING)
def test_word_for_word(name: str) -> None:
    assert written(get_template(name).render(CHAT)) == WORDING[name]
    asked = written(get_template(name).render(Conversation(CHAT.messages[:3]), generate=True))
    assert WORDING[name].startswith(asked.rpartition("⟧")[0] + "⟧")
    assert WORDING[name].rpartition("⟦")[0] == asked  # without a space at the end


def test_llama_2_begins_with_its_rules() -> None:
    text = written(get_template("llama_2").render(CHAT))
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always")
    assert "while being safe.  Your answers" in text  # both spaces are the original's
    assert "don't share false information.\n<</SYS>>\n\n{a}\nQ1 [/INST]" in text


def test_further_names() -> None:
    for other, name in {"vicuna_v1": "v1", "llava_v0": "v0"}.items():
        assert get_template(other).render(CHAT) == get_template(name).render(CHAT)


@pytest.mark.parametrize("name", [name for name, t in TEMPLATES.items() if isinstance(t, Template)])
def test_a_system_message_stands_for_the_templates_own(name: str) -> None:
    text = written(get_template(name).render(Conversation((Message("system", ("Sing.",)), *CHAT.messages))))
    assert text.count("Sing.") == 1 and text.index("Sing.") < text.index("Q1")
    assert not any(word in text for word in ("polite", "honest", "language and vision", "Answer the"))


FORMAT = ChatFormat(user=("<q>", "</q>"), assistant="<a>", stop="</a>", between="\n")


def test_a_format_of_ones_own() -> None:
    assert written(get_template(OWN, FORMAT).render(CHAT)) == (
        "<q>{a}\nQ1</q><a>⟦A1</a>⟧\n<q>Q2</q><a>⟦ A2</a>⟧"
    )
    with pytest.raises(InputError, match="the template 'own' needs the format that it stands for"):
        get_template(OWN)


def test_what_only_the_newest_answer_has() -> None:
    chat = replace(FORMAT, opening="<t>", stop_once=True)
    template = Template(OWN, chat)
    assert written(template.render(CHAT)) == "<q>{a}\nQ1</q><a>⟦A1⟧\n<q>Q2</q><a><t>⟦ A2</a>⟧"
    asked = Conversation(CHAT.messages[:3])
    assert written(template.render(asked, generate=True)) == "<q>{a}\nQ1</q><a>⟦A1⟧\n<q>Q2</q><a><t>"


def test_blanks_around_a_text_are_dropped_where_the_format_says() -> None:
    spaced = Conversation((Message("system", (" S ",)), user_message(" Q "), answer(" A ")))
    chat = replace(FORMAT, system=("<s>", "</s>"))
    for roles, expected in {
        (): "<s> S </s><q> Q </q><a>⟦ A </a>⟧",
        ("user",): "<s> S </s><q>Q</q><a>⟦ A </a>⟧",
        ("system", "assistant"): "<s>S</s><q> Q </q><a>⟦A</a>⟧",
    }.items():
        assert written(Template(OWN, replace(chat, trim=roles)).render(spaced)) == expected
    shown = Conversation((Message("user", (A, " Q ", B, " R ")),))
    assert written(Template(OWN, replace(chat, trim=("user",))).render(shown)) == "<q>{a}\n Q {b} R</q>"


def test_a_format_may_have_no_place_for_a_system_message() -> None:
    spoken = Conversation((Message("system", ("S",)), *CHAT.messages))
    with pytest.raises(
        InputError, match="'own' has no place for a system message; write it into the question"
    ):
        Template(OWN, FORMAT).render(spoken)
    assert isinstance(get_template("plain"), Plain)
    assert written(get_template("plain").render(spoken)) == "{a}⟦A1\n A2\n⟧"


def test_unknown_templates_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match="unknown template 'chatlm'; did you mean 'chatml'\\? known: plain, chatml, "
    ):
        get_template("chatlm")
    with pytest.raises(InputError, match="unknown template 'zzz'; known: plain, chatml, "):
        get_template("zzz")
