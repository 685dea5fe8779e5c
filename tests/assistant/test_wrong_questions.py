"""Wrong questions and messages are refused in a sentence, before they are asked."""

from __future__ import annotations

from typing import Any

import pytest

from pumice import InputError
from pumice.assistant import Assistant, load
from pumice.conversation import ImagePart, Message


def test_wrong_python_values(exact: Assistant) -> None:
    with pytest.raises(InputError, match="slots is 0"):
        list(exact.ask_each([(None, "What?")], slots=0))
    with pytest.raises(InputError, match=r"no sampling option 'temprature'; did you mean 'temperature'\?"):
        exact.ask(None, "What?", temprature=1.0)
    with pytest.raises(InputError, match=r"no sampling option 'zzz'; remove it, or update Pumice"):
        exact.stream([{"role": "user", "content": "What?"}], zzz=1.0)
    bare: Any = ["a.jpg"]
    assert "row 1 is 'a.jpg'; give (pictures, question)" in str(next(exact.ask_each(bare)))
    unread: Any = [InputError("there is no picture"), (None, "What?")]
    answers = list(exact.ask_each(unread, max_new_tokens=1))
    assert answers[0] is unread[0] and isinstance(answers[1], str)
    wrong: Any
    for wrong in (None, "hello", [5], {"role": "user", "content": "hello"}):
        with pytest.raises(InputError, match="messages must be a list"):
            exact.stream(wrong)
    number: Any = "fp16"
    with pytest.raises(InputError, match=r"dtype is 'fp16'; use torch\."):
        load("pumice-tiny", dtype=number)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        ([{"role": "user", "content": " "}], "question is empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message must be"),
        ([{"role": "assistant", "content": "a"}], "where 'user' should speak"),
        ([{"content": "a"}], "message 1 has no 'role'"),
        ([{"role": "user"}], "message 1 has no 'content'"),
        ([{"role": "user", "content": [{"type": "video"}]}], "message 1: unknown part"),
        ([{"role": "user", "content": ["a"]}], "message 1: unknown part 'a'"),
        ([{"role": "robot", "content": "a"}], "'robot'"),
        ([{"role": "user", "content": "long " * 300}], "context is 256"),
        ([Message("user", (ImagePart("no.jpg"), "what?"))], "'no.jpg' does not exist"),
    ],
)
def test_wrong_messages_are_refused_at_once(exact: Assistant, messages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        exact.stream(messages)


@pytest.mark.parametrize("question", ["", "  \n", 3])
def test_no_question(exact: Assistant, question: Any) -> None:
    with pytest.raises(InputError, match="question is"):
        exact.ask(None, question)
