"""Chat formats: exact wording, and which of it is learned."""

from __future__ import annotations

import pytest

from pumice.conversation import Conversation, ImagePart, Message, user_message
from pumice.errors import InputError
from pumice.templates import Span, Spans, get_template

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


def test_unknown_templates_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match="unknown template 'chatlm'; did you mean 'chatml'\\? known: plain, chatml"
    ):
        get_template("chatlm")
    with pytest.raises(InputError, match="unknown template 'zzz'; known: plain, chatml"):
        get_template("zzz")
