"""The library: what can be asked, in which forms, and that every way of asking gives the same answer."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pumice
from pumice import InputError
from pumice.assistant import CACHED_IMAGES, Assistant, conversation_of, load
from pumice.config import IMAGE_TOKEN, ImagePolicy
from pumice.conversation import Conversation, ImagePart, Message, user_message
from pumice.files import Lock
from pumice.formats.load import open_model
from pumice.formats.pumice.folder import save
from pumice.kernels import compute
from pumice.model.quantized import PackedEmbedding
from pumice.processor import Processor
from pumice.stopping import Stopped, stoppable

SHORT = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def exact(tiny_folder: Path) -> Assistant:
    return load(tiny_folder, device="cpu", quantize=None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for i in range(3):
        path = folder / f"picture {i}.png"
        Image.fromarray(random.integers(0, 256, (40 + i, 64, 3), np.uint8)).save(path)
        paths.append(path)
    return paths


def image_part(source: Any) -> dict[str, Any]:
    return {"type": "image", "image": source}


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


def test_a_second_turn_computes_only_what_is_new(exact: Assistant, pictures: list[Path]) -> None:
    fresh = Assistant(exact.model, exact.processor)
    first = [{"role": "user", "content": [image_part(pictures[0]), {"type": "text", "text": "What?"}]}]
    reply = fresh.stream(first, **SHORT)
    text = "".join(reply)
    assert reply.cached_tokens == 0
    again = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "Sure?"}]
    reply = fresh.stream(again, **SHORT)
    answer = "".join(reply)
    asked = fresh.prompt(conversation_of(first))
    assert reply.cached_tokens >= len(asked.input_ids) - 1
    assert answer == "".join(Assistant(exact.model, exact.processor).stream(again, **SHORT))


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


def test_wrong_python_values(exact: Assistant) -> None:
    with pytest.raises(InputError, match="slots is 0"):
        list(exact.ask_each([(None, "What?")], slots=0))
    with pytest.raises(InputError, match=r"no sampling option 'temprature'; did you mean 'temperature'\?"):
        exact.ask(None, "What?", temprature=1.0)
    with pytest.raises(InputError, match=r"no sampling option 'zzz'; remove it, or update Pumice"):
        exact.stream([{"role": "user", "content": "What?"}], zzz=1.0)
    bare: Any = ["a.jpg"]
    assert "row 1 is 'a.jpg'; give (pictures, question)" in str(next(exact.ask_each(bare)))
    wrong: Any
    for wrong in ("hello", [5], {"role": "user", "content": "hello"}):
        with pytest.raises(InputError, match="messages must be a list"):
            exact.stream(wrong)
    number: Any = "fp16"
    with pytest.raises(InputError, match=r"dtype is 'fp16'; use torch\."):
        load("pumice-tiny", dtype=number)


def test_a_picture_is_encoded_once(
    exact: Assistant, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Assistant(exact.model, exact.processor)
    shapes = []
    encode = type(exact.model).encode

    def counted(self: Any, pixels: torch.Tensor, *more: Any) -> torch.Tensor:
        shapes.append(pixels.shape)
        return encode(self, pixels, *more)

    monkeypatch.setattr(type(exact.model), "encode", counted)
    fresh.ask(pictures[0], "What?", **SHORT)
    list(fresh.ask_each([(pictures[0].read_bytes(), "Why?"), (pictures[:2], "Who?")], **SHORT))
    assert len(shapes) == 2
    for color in range(CACHED_IMAGES):
        fresh.logits(Image.new("RGB", (8, 8), (color, 0, 0)), "What?")
    assert len(fresh._image_tokens) == CACHED_IMAGES


def test_a_prompt_that_is_stopped_decodes_no_further_picture(
    exact: Assistant, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Assistant(exact.model, exact.processor)
    stop, decoded, decode = threading.Event(), [], Processor.pixels

    def pixels(processor: Processor, images: Any, *arguments: Any) -> Any:
        decoded.append(images)
        stop.set()
        return decode(processor, images, *arguments)

    monkeypatch.setattr(Processor, "pixels", pixels)
    with stoppable(stop), pytest.raises(Stopped):
        fresh.prompt(Conversation((user_message("What?", pictures[:2]),)))
    assert len(decoded) == 1


def test_logits_are_those_that_the_answer_comes_from(exact: Assistant, pictures: list[Path]) -> None:
    logits = exact.logits(pictures[0], "What?")
    prompt = exact.prompt(Conversation((user_message("What?", [pictures[0]]),)))
    assert logits.shape == (len(prompt.input_ids), 320)
    assert logits.dtype == torch.float32
    first = exact.processor.tokenizer.decode([int(logits[-1].argmax())])
    assert exact.ask(pictures[0], "What?", max_new_tokens=1) == first


def test_int8_is_close(exact: Assistant, tiny_folder: Path, pictures: list[Path]) -> None:
    int8 = load(tiny_folder, device="cpu", quantize="int8")
    assert int8.model.dtype == torch.float32
    assert isinstance(int8.model.decoder.embed, PackedEmbedding)
    actual, expected = (a.logits(pictures[0], "What?") for a in (int8, exact))
    away = ((actual - expected).abs().mean() / expected.std()).item()
    assert away < 0.04  # measured: 3.0e-2, of which 0.8e-2 by weights
    assert int8.ask(pictures[0], "What?", **SHORT)


def test_without_compiled_code_auto_stays_in_fp32(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "library", lambda: None)
    assistant = load(tiny_folder, device="cpu")
    assert assistant.model.dtype == torch.float32
    assert not isinstance(assistant.model.decoder.embed, PackedEmbedding)
    assert load(tiny_folder, device="cpu", quantize="int8").ask(None, "What?", **SHORT)


def test_load_is_reached_from_the_package(tiny_folder: Path) -> None:
    assert pumice.load(str(tiny_folder), device="cpu").ask(None, "Hi?", **SHORT)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pumice-huge"}, "'pumice-huge'"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
        ({"quantize": "int3"}, "quantize is 'int3'"),
    ],
)
def test_wrong_arguments_of_load(tiny_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(**{"name": tiny_folder, **arguments})


# --- pictures in tiles ---


@pytest.fixture(scope="module")
def tiled(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """The tiny model with the image policy of LLaVA-NeXT."""
    opened = open_model(tiny_folder)
    policy = ImagePolicy("anyres", pinpoints=((64, 128), (128, 64), (128, 128)))
    config = dataclasses.replace(opened.model.config, image=policy)
    state = opened.model.state_dict() | {"image_newline": torch.ones(config.decoder.width)}
    path = tmp_path_factory.mktemp("tiled") / "model"
    save(path, config, state, tokenizer=opened.processor.tokenizer.backend.to_str())
    return load(path, device="cpu", quantize=None)


def test_pictures_in_tiles_answer_alike_in_every_way(tiled: Assistant, pictures: list[Path]) -> None:
    shapes = [(50, 40), (20, 90), (200, 30)]
    resized = [Image.open(path).resize(shape) for path, shape in zip(pictures, shapes, strict=True)]
    rows: list[tuple[Any, str]] = [
        (resized[0], "What?"), (resized[1], "What?"), (None, "What?"), (resized, "All?"),
        (resized[2], "Why?"),
    ]  # fmt: skip
    one_by_one = [tiled.ask(images, question, **SHORT) for images, question in rows]
    assert list(tiled.ask_each(rows, slots=3, **SHORT)) == one_by_one
    lengths = [len(tiled.logits(image, "What?")) for image in resized]
    layouts = [tiled.processor.layouts([ImagePart(image)])[0] for image in resized]
    bare = len(tiled.logits(None, "What?")) + 1  # the newline behind the picture
    assert lengths == [bare + layout.tokens for layout in layouts]
    assert len(set(lengths)) == 3
    together = tiled.prompt(Conversation((user_message("All?", resized),)))
    assert together.images
    assert len(together.encode_images()) == sum(layout.tokens for layout in layouts)


@pytest.fixture
def several(tiled: Assistant) -> Assistant:
    """The same model, which shows each of several pictures as one square, as LLaVA-OneVision does."""
    image = dataclasses.replace(tiled.model.config.image, several="square")
    config = dataclasses.replace(tiled.model.config, image=image)
    model = copy.copy(tiled.model)  # the same weights
    model.config = config
    return Assistant(model, Processor(config, tiled.processor.tokenizer))


def test_a_picture_that_a_later_turn_adds_changes_the_first_one_s_tokens(
    several: Assistant, pictures: list[Path]
) -> None:
    first = [{"role": "user", "content": [image_part(pictures[0]), {"type": "text", "text": "What?"}]}]
    both = [
        *first,
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [image_part(pictures[1]), {"type": "text", "text": "And this?"}]},
    ]
    fresh = Assistant(several.model, several.processor)
    expected = [list(fresh.stream(both, **SHORT))]
    expected += [list(Assistant(several.model, several.processor).stream(first, **SHORT))]
    # Whatever was computed and remembered before, in either order:
    for _ in range(2):
        assert list(several.stream(first, **SHORT)) == expected[1]
        reply = several.stream(both, **SHORT)
        assert list(reply) == expected[0]
    alone, prompt = several.prompt(conversation_of(first)), several.prompt(conversation_of(both))
    assert [picture.count for picture in prompt.images] == [5, 5]  # 4 of the square, and the newline
    assert alone.images[0].count > 5
    assert alone.images[0].key != prompt.images[0].key
    again = several.stream(both, **SHORT)
    list(again)
    assert again.cached_tokens >= len(prompt.input_ids) - 1  # asked before: nothing but the last is new
    new = Assistant(several.model, several.processor)
    list(new.stream(first, **SHORT))
    reply = new.stream(both, **SHORT)
    list(reply)
    before = int((prompt.input_ids == IMAGE_TOKEN).int().argmax())
    assert reply.cached_tokens == before  # the text before the first picture, and none of its tokens


@pytest.mark.parametrize(
    ("trained", "policy", "shown", "message"),
    [
        (1, "tiles", 10, "has 10 pictures, and the model was trained on at most 1: answers may"),
        (0, "square", 3, "has 3 pictures, and the model was trained on at most 1:"),
        (None, "tiles", 2, "the model's folder does not say that it was trained on more than 1:"),
        (None, "square", 10, None),
        (10, "tiles", 10, None),
        (None, "tiles", 1, None),
    ],
)
def test_more_pictures_than_in_training_are_answered_and_told_once(
    tiled: Assistant, caplog: pytest.LogCaptureFixture, trained: int | None, policy: str, shown: int,
    message: str | None,
) -> None:  # fmt: skip
    image = dataclasses.replace(tiled.model.config.image, several=policy)
    decoder = dataclasses.replace(tiled.model.config.decoder, context=4096)
    config = dataclasses.replace(tiled.model.config, image=image, decoder=decoder, trained_pictures=trained)
    model = copy.copy(tiled.model)
    model.config = config
    asked = Assistant(model, Processor(config, tiled.processor.tokenizer))
    images = [Image.new("RGB", (40, 30), (number, 0, 0)) for number in range(shown)]
    for _ in range(2):
        assert isinstance(asked.ask(images, "What?", max_new_tokens=2), str)
    messages_logged = [record.getMessage() for record in caplog.records]
    assert len(messages_logged) == (message is not None)
    assert message is None or message in messages_logged[0]


def test_what_is_remembered_is_counted_in_tokens(tiled: Assistant) -> None:
    fresh = Assistant(tiled.model, tiled.processor)
    room = CACHED_IMAGES * tiled.model.config.image_tokens
    for color in range(CACHED_IMAGES):
        fresh.logits(Image.new("RGB", (90, 90), (color, 0, 0)), "What?")
        assert sum(map(len, fresh._image_tokens.values())) <= room
    assert 1 < len(fresh._image_tokens) < CACHED_IMAGES / 2


def test_the_end_of_a_row_of_tiles_matters(tiled: Assistant, pictures: list[Path]) -> None:
    before = tiled.logits(pictures[0], "What?")
    tiled._image_tokens.clear()
    newline = tiled.model.image_newline
    assert newline is not None
    newline.data.neg_()
    after = tiled.logits(pictures[0], "What?")
    newline.data.neg_()
    tiled._image_tokens.clear()
    assert (before - after).abs().max() > 0.1


# --- picture files that change ---


@pytest.mark.parametrize("kind", ["exact", "tiled"])
def test_a_file_that_is_replaced_while_it_is_read(
    kind: str, tmp_path: Path, replaced_when_opened: Any, request: pytest.FixtureRequest
) -> None:
    model: Assistant = request.getfixturevalue(kind)
    contents = []
    for color, size in (("red", (64, 40)), ("blue", (30, 90))):
        Image.new("RGB", size, color).save(tmp_path / "made.png")
        contents.append((tmp_path / "made.png").read_bytes())
    right = [model.logits(data, "What?") for data in contents]
    file = tmp_path / "latest.png"
    replaced_when_opened(file, contents)
    fresh = Assistant(model.model, model.processor)
    for expected in (*right, *right):
        assert torch.equal(fresh.logits(file, "What?"), expected)
    assert all(
        torch.equal(fresh.logits(data, "What?"), expected)
        for data, expected in zip(contents, right, strict=True)
    )


def test_an_explanation_draws_the_picture_that_it_explains(
    exact: Assistant, tmp_path: Path, replaced_when_opened: Any
) -> None:
    contents = []
    for color in ("red", "blue"):
        Image.new("RGB", (64, 40), color).save(tmp_path / "made.png")
        contents.append((tmp_path / "made.png").read_bytes())
    right = exact.explain(contents[0], "What?", "A dog.")
    replaced_when_opened(tmp_path / "latest.png", contents)
    explanation = exact.explain(tmp_path / "latest.png", "What?", "A dog.")
    assert np.array_equal(explanation.reliance.shown, right.reliance.shown)


def test_a_file_that_is_deleted_between_two_questions(exact: Assistant, tmp_path: Path) -> None:
    file = tmp_path / "latest.png"
    Image.new("RGB", (64, 40), "red").save(file)
    assert exact.ask(file, "What?", **SHORT)
    file.unlink()
    with pytest.raises(InputError, match=r"latest\.png' does not exist; check the path"):
        exact.ask(file, "What?", **SHORT)
    file.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"picture '.*latest\.png' is not a picture"):
        exact.ask(file, "Why?", **SHORT)


def test_a_model_s_folder_says_how_answers_are_drawn(exact: Assistant, penalising: Path) -> None:
    model = load(penalising, device="cpu", quantize=None)
    answer = exact.ask(None, "What?", **SHORT, repetition_penalty=9.0)
    assert answer != exact.ask(None, "What?", **SHORT)
    assert model.ask(None, "What?", **SHORT) == answer
    assert model.ask_many([(None, "What?")], **SHORT) == [answer]
    assert model.ask(None, "What?", **SHORT, repetition_penalty=1.0) == exact.ask(None, "What?", **SHORT)


def test_after_an_edit_everything_is_forgotten(tiny_folder: Path, pictures: list[Path]) -> None:
    """Image tokens as well, which the tower and the connector gave before."""
    assistant = load(tiny_folder, device="cpu", quantize=None)
    before = assistant.logits(pictures[0], "What?")
    with torch.no_grad():
        for parameter in assistant.model.connector.parameters():
            parameter.neg_()
    assert torch.equal(assistant.logits(pictures[0], "What?"), before)  # remembered
    assistant.forget()
    changed = assistant.logits(pictures[0], "What?")
    assert not torch.allclose(changed, before)
    fresh = Assistant(assistant.model, assistant.processor)
    assert torch.equal(fresh.logits(pictures[0], "What?"), changed)
    assert assistant.ask(pictures[0], "What?", **SHORT) == fresh.ask(pictures[0], "What?", **SHORT)


def test_a_hook_of_the_connector_is_computed_for_a_known_picture(
    tiny_folder: Path, pictures: list[Path]
) -> None:
    assistant = load(tiny_folder, device="cpu", quantize=None)
    before = assistant.logits(pictures[0], "What?")
    handle = assistant.model.connector.register_forward_hook(lambda _, inputs, output: -output)
    hooked = assistant.logits(pictures[0], "What?")
    assert not torch.allclose(hooked, before)
    assert assistant.ask(pictures[0], "What?", **SHORT) == Assistant(
        assistant.model, assistant.processor
    ).ask(pictures[0], "What?", **SHORT)
    handle.remove()
    assert torch.equal(assistant.logits(pictures[0], "What?"), before)
