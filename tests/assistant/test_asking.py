"""What can be asked, in which forms, and that every way of asking gives the same answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from questions import SHORT, image_part

from pumice import InputError
from pumice.assistant import Assistant, load
from pumice.config import GenerationConfig
from pumice.conversation import Conversation, Message, user_message
from pumice.files import Lock


def test_every_kind_of_picture_gives_the_same_answer(exact: Assistant, pictures: list[Path]) -> None:
    path = pictures[0]
    expected = exact.ask(path, "What?", **SHORT)
    assert expected
    for source in (str(path), path.read_bytes(), Image.open(path), [path], (path,)):
        assert exact.ask(source, "What?", **SHORT) == expected


def test_a_picture_changes_the_logits(exact: Assistant, pictures: list[Path]) -> None:
    first, second = (exact.logits(path, "What?") for path in pictures[:2])
    assert first.shape == second.shape
    assert not torch.allclose(first, second)


def test_no_picture_and_several(exact: Assistant, pictures: list[Path]) -> None:
    assert exact.ask(None, "What?", **SHORT) == exact.ask([], "What?", **SHORT)
    two = exact.logits(pictures[:2], "What?")
    # a picture is 4 tokens, the newline behind it 1
    assert len(two) == len(exact.logits(None, "What?")) + 10


def test_placeholders_say_where_pictures_go(exact: Assistant, pictures: list[Path]) -> None:
    before = exact.logits(pictures[:2], "<image> and <image>?")
    assert len(before) != len(exact.logits(pictures[:2], " and ?"))


def test_messages_in_every_form(exact: Assistant, pictures: list[Path]) -> None:
    path = pictures[0]
    conversation = Conversation(
        (
            Message("system", ("Be brief.",)),
            user_message("What?", [path]),
            Message("assistant", ("A dog.",)),
            Message("user", ("Sure?",)),
        )
    )
    dictionaries: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(path), {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": "Sure?"},
    ]
    expected = "".join(exact.stream(conversation, **SHORT))
    assert expected == "".join(exact.stream(dictionaries, **SHORT))
    assert expected == "".join(exact.stream(conversation.messages, **SHORT))


def test_a_reply_says_how_it_ended(exact: Assistant) -> None:
    reply = exact.stream([{"role": "user", "content": "What?"}], max_new_tokens=7)
    assert (reply.finish, reply.tokens) == (None, 0)
    text = "".join(reply)
    assert (reply.finish, reply.tokens) == ("length", 7)
    stop = text[2:4]
    reply = exact.stream([{"role": "user", "content": "What?"}], max_new_tokens=7, stop=(stop,))
    assert "".join(reply) == text[: text.index(stop)]
    assert reply.finish == "stop"


def test_a_batch_answers_as_one_by_one(exact: Assistant, pictures: list[Path], tmp_path: Path) -> None:
    rows: list[tuple[Any, str]] = [
        (pictures[0], "What is it?"),
        (tmp_path / "missing.png", "What?"),
        (None, "Who are you, and what is in the picture?"),
        (pictures, "<image> <image> <image> all?"),
        (pictures[1], "<image> <image>"),
        (pictures[1], " "),
        (pictures[0], "Why?"),
    ]
    for slots in (1, 2, 8):
        answers = list(exact.ask_each(rows, slots=slots, **SHORT))
        for (images, question), answer in zip(rows, answers, strict=True):
            if isinstance(answer, InputError):
                with pytest.raises(InputError) as error:
                    exact.ask(images, question, **SHORT)
                assert str(error.value) == str(answer)
            else:
                assert answer == exact.ask(images, question, **SHORT)
        assert [isinstance(a, InputError) for a in answers] == [False, True, False, False, True, True, False]


def test_many_answers_in_a_file_go_on_where_they_stopped(
    exact: Assistant, pictures: list[Path], tmp_path: Path
) -> None:
    rows: list[tuple[Any, str]] = [
        (pictures[0], "What is it?"),
        (tmp_path / "missing.png", "What?"),
        (None, "Who?"),
        (pictures[:2], "All?"),
    ]
    complete_file, progress_counts = tmp_path / "whole.jsonl", list[int]()
    answers = exact.ask_many(rows, out=complete_file, progress=progress_counts.append, **SHORT)
    assert progress_counts == [1, 2, 3, 4]
    assert [str(a) for a in answers] == [str(a) for a in exact.ask_many(rows, **SHORT)]
    lines = [json.loads(line) for line in complete_file.read_text().splitlines()]
    row = {"images": [str(pictures[0])], "question": "What is it?", "answer": answers[0]}
    assert lines[0] == {**row, "asked": SHORT}
    assert "missing.png" in lines[1]["error"]

    stopped = tmp_path / "stopped.jsonl"
    stopped.write_bytes(
        complete_file.read_bytes()[: complete_file.read_bytes().find(b"\n", 200) + 5]
    )  # in the midst of a line
    line_count = len(stopped.read_text().splitlines()) - 1
    assert 0 < line_count < 4
    progress_counts.clear()
    again = exact.ask_many(rows, out=stopped, progress=progress_counts.append, **SHORT)
    assert [str(a) for a in again] == [str(a) for a in answers]
    assert [isinstance(a, InputError) for a in again] == [False, True, False, False]
    assert progress_counts == list(range(line_count + 1, 5))
    assert stopped.read_bytes() == complete_file.read_bytes()

    before = complete_file.read_bytes()
    for other in (rows[:3], [(None, "What is it?"), *rows[1:]], [(pictures[0], "Why?"), *rows[1:]]):
        with pytest.raises(InputError, match="the file is of other rows"):
            exact.ask_many(other, out=complete_file, **SHORT)
    with pytest.raises(
        InputError, match=r"was asked with \{'max_new_tokens': \d+\}, now with \{'max_new_tokens': 9\}; ask"
    ):
        exact.ask_many(rows, out=complete_file, max_new_tokens=9)
    with Lock(complete_file) as lock:
        assert lock.acquire()
        with pytest.raises(InputError, match="another run is writing"):
            exact.ask_many(rows, out=complete_file, **SHORT)
    with pytest.raises(InputError, match="cannot be written"):
        exact.ask_many(rows, out=tmp_path / "no" / "folder.jsonl")
    assert complete_file.read_bytes() == before


def test_a_reply_that_is_closed_or_forgotten_costs_nothing_more(exact: Assistant) -> None:
    fresh = Assistant(exact.model, exact.processor)
    reply = fresh.stream([{"role": "user", "content": "What?"}])
    next(reply)
    reply.close()
    assert len(list(reply)) <= 1
    assert reply.finish == "cancelled"
    forgotten = fresh.stream([{"role": "user", "content": "What?"}]).begin()
    fresh.engine.step()
    del forgotten
    fresh.engine.step()
    assert fresh.engine.stats().running == 0


def test_replies_come_from_an_engine_that_runs_by_itself(exact: Assistant, pictures: list[Path]) -> None:
    fresh = Assistant(exact.model, exact.processor)
    fresh.engine.start()
    rows = [(pictures[n % 3], question) for n in range(3) for question in ("What?", "Why?")]
    assert fresh.ask_many(rows, slots=4, **SHORT) == exact.ask_many(rows, **SHORT)
    assert fresh.ask(pictures[0], "What?", **SHORT) == exact.ask(pictures[0], "What?", **SHORT)
    fresh.engine.close()


def test_logits_are_those_that_the_answer_comes_from(exact: Assistant, pictures: list[Path]) -> None:
    logits = exact.logits(pictures[0], "What?")
    prompt = exact.prompt(Conversation((user_message("What?", [pictures[0]]),)))
    assert logits.shape == (len(prompt.input_ids), 320)
    assert logits.dtype == torch.float32
    first = exact.processor.tokenizer.decode([int(logits[-1].argmax())])
    assert exact.ask(pictures[0], "What?", max_new_tokens=1) == first


def test_beams(exact: Assistant, pictures: list[Path]) -> None:
    beams = {**SHORT, "num_beams": 3}
    answer = exact.ask(pictures[0], "What?", **beams)
    assert answer != exact.ask(pictures[0], "What?", **SHORT)
    reply = exact.stream(Conversation((user_message("What?", [pictures[0]]),)), **beams)
    assert list(reply) == [answer]  # as a whole
    assert (reply.tokens > 0, reply.prompt_progress[0]) == (True, reply.prompt_progress[1])
    with pytest.raises(InputError, match="num_beams is 3, which does not go with a schema"):
        exact.stream([{"role": "user", "content": "What?"}], schema={"type": "object"}, **beams)


def test_a_search_ends_with_a_stop_text(exact: Assistant, pictures: list[Path]) -> None:
    """It does not run on until a stop token, or until the longest answer."""
    beams: dict[str, Any] = {"max_new_tokens": 60, "num_beams": 3, "length_penalty": 0.0}
    question = Conversation((user_message("What?", [pictures[0]]),))
    assert (reply := exact.stream(question, **beams)) and "".join(reply) and reply.tokens == 60
    before = exact.engine.stats().steps
    reply = exact.stream(question, **beams, stop=tuple("aeiou "))
    assert not set("".join(reply)) & set("aeiou ") and reply.finish == "stop"
    assert exact.engine.stats().steps - before < 30


def test_a_model_s_own_beams_give_way(exact: Assistant, pictures: list[Path]) -> None:
    generation = GenerationConfig(num_beams=3)
    with_beams = dataclasses.replace(exact.model.config, generation=generation)
    model = Assistant(exact.model, exact.processor)
    own = exact.ask(pictures[0], "What?", **SHORT, num_beams=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact.model, "config", with_beams)
        assert model.ask(pictures[0], "What?", **SHORT) == own
        assert model.ask_many([(pictures[0], "What?")], **SHORT) == [own]
        assert model.ask(pictures[0], "What?", **SHORT, num_beams=1) != own
        drawn = model.ask(pictures[0], "What?", **SHORT, temperature=1.0, seed=3)
        schema = {"type": "string", "maxLength": 3}
        held = "".join(
            model.stream(Conversation((user_message("What?", [pictures[0]]),)), schema=schema, **SHORT)
        )
        with pytest.raises(InputError, match=r"length_penalty is 2\.0, which does not go with a schema"):
            model.stream([{"role": "user", "content": "What?"}], schema=schema, length_penalty=2.0)
    assert drawn == exact.ask(pictures[0], "What?", **SHORT, temperature=1.0, seed=3)
    assert held == "".join(
        exact.stream(Conversation((user_message("What?", [pictures[0]]),)), schema=schema, **SHORT)
    )


def test_a_model_s_folder_says_how_answers_are_drawn(exact: Assistant, penalising: Path) -> None:
    model = load(penalising, device="cpu", quantize=None)
    answer = exact.ask(None, "What?", **SHORT, repetition_penalty=9.0)
    assert answer != exact.ask(None, "What?", **SHORT)
    assert model.ask(None, "What?", **SHORT) == answer
    assert model.ask_many([(None, "What?")], **SHORT) == [answer]
    assert model.ask(None, "What?", **SHORT, repetition_penalty=1.0) == exact.ask(None, "What?", **SHORT)
