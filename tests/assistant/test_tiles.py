"""Pictures in tiles, and several pictures."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from questions import SHORT, image_part

from pumice.assistant import CACHED_IMAGES, Assistant, conversation_of
from pumice.config import IMAGE_TOKEN
from pumice.conversation import Conversation, ImagePart, user_message
from pumice.processor import Processor


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
