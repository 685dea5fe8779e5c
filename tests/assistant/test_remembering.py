"""What was computed once is used again, until the model or a picture's file changes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from questions import SHORT, image_part

from pumice import InputError
from pumice.assistant import CACHED_IMAGES, Assistant, conversation_of, load
from pumice.conversation import Conversation, user_message
from pumice.engine.requests import Delta
from pumice.kernels.loader import compiled
from pumice.processor import Processor
from pumice.stopping import Stopped, stoppable


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


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_quantised_model_gives_the_same_numbers_again(
    tiny_folder: Path, pictures: list[Path], bits: Any
) -> None:
    """Bit for bit, with all of the prompt cached, its picture alone, or nothing."""
    if not compiled("packed")[0]:
        pytest.skip(compiled("packed")[1])

    def numbers(question: str) -> list[float]:
        conversation, deltas = Conversation((user_message(question, [pictures[0]]),)), list[Delta]()
        model.engine.submit(model.prompt(conversation, max_new_tokens=1, logprobs=5), deltas.append)
        while model.engine.step():
            pass
        return [logprob for delta in deltas for token in delta.logprobs or () for _, logprob in token.top]

    model = load(tiny_folder, device="cpu", quantize=bits)
    what, why = numbers("What is this?"), numbers("Why?")
    assert len(what) == 5
    assert numbers("What is this?") == what
    model.forget()
    assert (numbers("Why?"), numbers("What is this?")) == (why, what)


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
