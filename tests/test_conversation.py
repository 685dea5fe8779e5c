"""Conversations: who may speak when, and how LLaVA's rows become messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice.conversation import Conversation, ImagePart, Message, from_llava, question_message, user_message
from pumice.errors import InputError

A, B = ImagePart("a.jpg"), ImagePart("b.jpg")


def talk(*turns: tuple[str, str | tuple[str | ImagePart, ...]], name: str = "") -> Conversation:
    parts = [(role, (content,) if isinstance(content, str) else content) for role, content in turns]
    return Conversation(tuple(Message(role, content) for role, content in parts), id=name)


SYSTEM, USER, ANSWER = ("system", "Be brief."), ("user", "What?"), ("assistant", "A dog.")


@pytest.mark.parametrize("turns", [(USER, ANSWER), (SYSTEM, USER, ANSWER), (USER, ANSWER, USER, ANSWER)])
def test_answered_conversations_pass(turns: tuple[tuple[str, str], ...]) -> None:
    conversation = talk(*turns)
    assert conversation.check(answered=True) is conversation
    with pytest.raises(InputError, match="the last message must be a question from the user"):
        conversation.check(answered=False)


@pytest.mark.parametrize("turns", [(USER,), (SYSTEM, USER), (USER, ANSWER, USER)])
def test_questions_pass(turns: tuple[tuple[str, str], ...]) -> None:
    conversation = talk(*turns)
    assert conversation.check(answered=False) is conversation
    with pytest.raises(InputError, match="the last question has no answer to learn from"):
        conversation.check(answered=True)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((), "there are no messages; give at least one question"),
        ((SYSTEM,), "there are no messages; give at least one question"),
        ((ANSWER,), "message 1 is from 'assistant' where 'user' should speak"),
        ((USER, USER), "message 2 is from 'user' where 'assistant' should speak"),
        ((USER, SYSTEM, ANSWER), "message 2 is from 'system' where 'assistant' should speak"),
        ((SYSTEM, SYSTEM, USER, ANSWER), "message 1 is from 'system' where 'user' should speak"),
        ((USER, ("gpt", "x")), "unknown role 'gpt'; use one of system, user, assistant"),
        ((USER, ("assistant", (A, "x"))), "message 2: only the user can show a picture"),
        (
            (("system", (A, "x")), USER, ANSWER),
            "the system message holds a picture; only the user can show one",
        ),
        ((USER, ("assistant", " \n")), "message 2 is an empty answer; remove the turn"),
        ((USER, ("assistant", "a\ud83d")), r"a text holds half of a character, '\ud83d'; remove it"),
    ],
)
def test_wrong_conversations_are_refused(turns: tuple[tuple[str, str], ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        talk(*turns, name="row 7").check(answered=True)
    assert str(caught.value).startswith(f"conversation 'row 7': {message}")
    with pytest.raises(InputError) as caught:
        talk(*turns).check(answered=True)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("content", ["", "  \n"])
def test_an_empty_question_is_refused(content: str) -> None:
    with pytest.raises(InputError, match="the question is empty; say what you want to know"):
        talk(("user", content)).check(answered=False)


def test_a_picture_alone_is_a_question() -> None:
    talk(("user", (A,)), ANSWER).check(answered=True)
    talk(("user", (A, " "))).check(answered=False)


def test_only_a_conversation_to_answer_begins_with_a_greeting() -> None:
    greeted = talk(ANSWER, USER)
    assert greeted.check(answered=False) is greeted
    with pytest.raises(InputError, match="message 1 is from 'assistant' where 'user' should speak"):
        talk(ANSWER, USER, ANSWER).check(answered=True)
    with pytest.raises(InputError, match="message 2 is from 'assistant' where 'user' should speak"):
        talk(ANSWER, ANSWER, USER).check(answered=False)


def test_a_begun_answer_is_continued_where_that_is_asked_for() -> None:
    begun = talk(USER, ANSWER)
    assert begun.check(answered=False, continued=True) is begun
    with pytest.raises(InputError, match="the last message must be a question"):
        begun.check(answered=False)
    with pytest.raises(InputError, match="must be the assistant's, which is to be continued"):
        talk(USER).check(answered=False, continued=True)


def test_pictures_and_text_of_messages() -> None:
    conversation = talk(("user", (A, "one ", B, "two")), ANSWER, ("user", (A,)))
    assert conversation.images == [A, B, A]
    assert conversation.messages[0].text == "one two"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\nWhat?", (A, "What?")),
        ("What?\n<image>", (A, "What?")),
        ("What <image> is it?", (A, "What  is it?")),
        ("  <image> What? ", (A, "What?")),
        ("<image>", (A,)),
        (" <image>\n", (A,)),
    ],
)
def test_one_picture_moves_to_the_front(text: str, parts: tuple[str | ImagePart, ...]) -> None:
    (message,) = from_llava("r", [("human", text)], ["a.jpg"]).messages
    assert message == Message("user", parts)
    assert user_message(text, ["a.jpg"]) == message


def test_several_pictures_stay_where_they_are_written() -> None:
    (message,) = from_llava("r", [("human", "First <image>\nthen <image> end")], ["a.jpg", "b.jpg"]).messages
    assert message.parts == ("First ", A, "\nthen ", B, " end")
    assert user_message("<image><image>\nBoth?", ["a.jpg", "b.jpg"]).parts == (A, B, "\nBoth?")


def test_pictures_are_dealt_to_the_turns_in_order() -> None:
    turns = [
        ("human", "<image>\nThis?"),
        ("gpt", "A."),
        ("human", "And?"),
        ("gpt", "B."),
        ("human", "x <image>"),
    ]
    conversation = from_llava("r", turns, ["a.jpg", "b.jpg"])
    assert [m.images for m in conversation.messages] == [[A], [], [], [], [B]]
    assert [m.role for m in conversation.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert conversation.id == "r"


def test_text_without_pictures_is_left_as_written() -> None:
    turns = [("system", " S "), ("human", "  Leading spaces matter? "), ("gpt", " Yes. ")]
    assert [m.parts for m in from_llava("r", turns).messages] == [(t,) for _, t in turns]


def test_a_placeholder_in_an_answer_is_text() -> None:
    conversation = from_llava("r", [("human", "Tag?"), ("gpt", "Write <image>.")])
    assert conversation.messages[1].parts == ("Write <image>.",)
    assert conversation.images == []


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> What?", [], "1 <image> placeholder for 0 pictures;"),
        ("What?", ["a.jpg"], "0 <image> placeholders for 1 picture;"),
        ("<image><image>", ["a.jpg"], "2 <image> placeholders for 1 picture;"),
        ("<image> What?", ["a.jpg", "b.jpg"], "1 <image> placeholder for 2 pictures;"),
    ],
)
def test_both_counts_are_in_the_message(text: str, images: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"row 'r9': {message}"):
        from_llava("r9", [("human", text), ("gpt", "x")], images)


@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("What does <image> mean?", []), ("<image> in LLaVA means what?", []),
        ("What does <image> mean?", ["a"]), ("Is <image> a word?", ["a", "b"]),
    ],
)  # fmt: skip
def test_the_word_image_in_a_question(question: str, images: list[str]) -> None:
    assert question_message(question, images).parts == (*map(ImagePart, images), question)


def test_a_placeholder_in_a_question() -> None:
    for question in ("<image>\nWhat?", "What?\n<image>"):
        assert question_message(question, ["a.jpg"]) == user_message("What?", ["a.jpg"])
    assert question_message("<image> or <image>?", ["a.jpg", "b.jpg"]).parts == (A, " or ", B, "?")
    with pytest.raises(InputError, match="question: 1 <image> placeholder for 2 pictures"):
        question_message("<image> What?", ["a.jpg", "b.jpg"])


def test_a_question_needs_no_placeholder_but_not_a_wrong_number() -> None:
    assert user_message("What?", ["a.jpg", "b.jpg"]).parts == (A, B, "What?")
    assert user_message("What?").parts == ("What?",)
    with pytest.raises(InputError, match="question: 1 <image> placeholder for 2 pictures; write one"):
        user_message("<image> What?", ["a.jpg", "b.jpg"])
    with pytest.raises(InputError, match="question: 1 <image> placeholder for 0 pictures"):
        user_message("What is <image>?")


def test_unknown_speakers_are_refused() -> None:
    with pytest.raises(InputError, match="row 'r': unknown speaker 'bot'; use 'human' or 'gpt'"):
        from_llava("r", [("human", "x"), ("bot", "y")])


def test_a_picture_has_a_name_for_people() -> None:
    assert A.name == "a.jpg"
    assert ImagePart(Path("x/b.png")).name == str(Path("x/b.png"))
    assert ImagePart(b"12345").name == "picture of 5 bytes"
    assert ImagePart(object()).name == "object"
