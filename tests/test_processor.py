"""The processor: one path from a conversation to ids, labels and pixels."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pumice.config import (
    IMAGE_TOKEN,
    ConnectorConfig,
    DecoderConfig,
    ImagePolicy,
    ModelConfig,
    VisionConfig,
)
from pumice.conversation import Conversation, ImagePart, Message, from_llava, user_message
from pumice.errors import InputError
from pumice.geometry import Layout, tile_layout
from pumice.images import image_key, pixels, to_tiles
from pumice.processor import Processor
from pumice.tokens import IGNORE, Tokenizer

CONFIG = ModelConfig(
    DecoderConfig(
        vocab_size=320, width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp_width=32, context=128
    ),
    VisionConfig(image_size=64),
    stop_token_ids=(2,),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_folder / "tokenizer.json")


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> Processor:
    return Processor(CONFIG, tokenizer)


def picture(color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, color)


def row(answer: str = "A dog.", images: int = 1, name: str = "r1") -> Conversation:
    question = "<image>" * images + "What?"
    return from_llava(name, [("human", question), ("gpt", answer)], [picture((9, 9, 9))] * images)


def test_a_training_sample(processor: Processor, tokenizer: Tokenizer) -> None:
    conversation = row()
    sample = processor.training_sample(conversation)
    assert sample.id == "r1"
    assert sample.input_ids.dtype == sample.labels.dtype == np.int64
    assert sample.input_ids.shape == sample.labels.shape == (len(sample.input_ids),)
    assert (sample.input_ids == IMAGE_TOKEN).sum() == CONFIG.image_tokens == 4
    assert sample.images == tuple(conversation.images)
    supervised = sample.labels[sample.labels != IGNORE]
    assert sample.supervised == len(supervised)
    assert tokenizer.backend.decode(supervised.tolist(), skip_special_tokens=False) == "A dog.<|im_end|>"


def test_a_prompt_is_the_beginning_of_the_training_sample(processor: Processor) -> None:
    conversation = row()
    sample = processor.training_sample(conversation)
    prompt = processor.prompt(Conversation(conversation.messages[:1]))
    assert np.array_equal(sample.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert len(sample.input_ids) - len(prompt.input_ids) == sample.supervised
    assert prompt.supervised == 0
    assert prompt.images == sample.images


@pytest.mark.parametrize("reduce", ["average", "pixel_shuffle"])
def test_placeholders_follow_the_connector(tokenizer: Tokenizer, reduce: str) -> None:
    config = dataclasses.replace(CONFIG, connector=ConnectorConfig("linear", reduce, 2))
    sample = Processor(config, tokenizer).training_sample(row(images=3))
    assert (sample.input_ids == IMAGE_TOKEN).sum() == 3


def test_pictures_keep_their_order_over_messages(processor: Processor) -> None:
    a, b, c = (ImagePart(name) for name in "abc")
    conversation = Conversation((
        Message("user", ("Now ", a, " and ", b)), Message("assistant", ("Yes.",)),
        user_message("This?", ["c"]), Message("assistant", ("No.",)),
    ))  # fmt: skip
    sample = processor.training_sample(conversation)
    assert sample.images == (a, b, c)
    positions = np.flatnonzero(sample.input_ids == IMAGE_TOKEN)
    assert [len(run) for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)] == [4, 4, 4]


def test_pixels_are_those_of_the_image_policy(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    picture((200, 10, 10)).save(path)
    parts = (ImagePart(path), ImagePart(picture((0, 0, 250), (30, 40))), ImagePart(path.read_bytes()))
    stacked = processor.pixels(parts, processor.layouts(parts))
    assert stacked.shape == (3, 3, 64, 64)
    assert stacked.dtype == np.float32
    expected = pixels(picture((200, 10, 10)), 64, CONFIG.image)
    assert np.array_equal(stacked[0], expected)
    assert np.array_equal(stacked[2], expected)
    assert stacked[0, 0, 32, 32] > stacked[1, 0, 32, 32]


TILED = dataclasses.replace(
    CONFIG, image=ImagePolicy("anyres", pinpoints=((64, 128), (128, 64), (128, 128))), bos_token_id=None
)


def runs(ids: np.ndarray) -> list[int]:
    """How many placeholders stand in each run of them."""
    positions = np.flatnonzero(ids == IMAGE_TOKEN)
    return [len(run) for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)]


def test_under_anyres_every_picture_has_its_own_count(tokenizer: Tokenizer, tmp_path: Path) -> None:
    processor = Processor(TILED, tokenizer)
    sizes = [(40, 30), (30, 90), (200, 10)]
    path = tmp_path / "a.png"
    picture((1, 2, 3), sizes[1]).save(path)
    parts = [
        ImagePart(picture((9, 9, 9), sizes[0])),
        ImagePart(path),
        ImagePart(picture((5, 5, 5), sizes[2])),
    ]
    question = Message("user", (parts[0], "one", parts[1], "two", parts[2], "three?"))
    sample = processor.prompt(Conversation((question,)))
    assert sample.layouts == tuple(tile_layout(TILED, size) for size in sizes)
    assert runs(sample.input_ids) == [layout.tokens for layout in sample.layouts]
    assert len({layout.tokens for layout in sample.layouts}) == 3
    pixels_of = processor.pixels(sample.images, sample.layouts)
    assert len(pixels_of) == sum(layout.tiles for layout in sample.layouts)
    first = to_tiles(picture((9, 9, 9), sizes[0]), 64, TILED.image)
    assert np.array_equal(pixels_of[: len(first)], first)


def test_a_picture_on_its_side_is_counted_upright(tokenizer: Tokenizer) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture((9, 9, 9), (90, 30)).save(buffer, "JPEG", exif=exif)
    processor = Processor(TILED, tokenizer)
    parts = (ImagePart(buffer.getvalue()),)
    layouts = processor.layouts(parts)
    assert layouts == (tile_layout(TILED, (30, 90)),) != (tile_layout(TILED, (90, 30)),)
    assert len(processor.pixels(parts, layouts)) == layouts[0].tiles


SEVERAL = dataclasses.replace(TILED, image=dataclasses.replace(TILED.image, several="square"))


def test_each_of_several_pictures_is_one_padded_square(tokenizer: Tokenizer) -> None:
    processor, tiles = Processor(SEVERAL, tokenizer), Processor(TILED, tokenizer)
    assert processor.prompt(shown := asked(1)).layouts == tiles.prompt(shown).layouts
    sample = processor.prompt(asked(2))
    assert runs(sample.input_ids) == [5, 5]  # the square's 4, and the newline behind it
    assert runs(tiles.prompt(asked(2)).input_ids)[0] > 5
    image_pixels = processor.pixels(sample.images, sample.layouts)
    padded = dataclasses.replace(SEVERAL.image, mode="pad")
    assert np.array_equal(image_pixels, [pixels(picture((n, 0, 0), (90, 30)), 64, padded) for n in range(2)])


def test_all_pictures_of_a_training_row_count_from_its_first_turn(tokenizer: Tokenizer) -> None:
    processor = Processor(SEVERAL, tokenizer)
    turns = [("human", "<image>What?"), ("gpt", "A dog."), ("human", "<image>And this?"), ("gpt", "A cat.")]
    row = from_llava("r", turns, [picture((n, 0, 0), (90, 30)) for n in range(2)])
    sample, prompt = processor.training_sample(row), processor.prompt(Conversation(row.messages[:3]))
    assert runs(sample.input_ids) == [5, 5]
    assert np.array_equal(sample.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert sample.layouts == prompt.layouts


def test_a_picture_s_square_and_its_tiles_have_two_keys(processor: Processor, tokenizer: Tokenizer) -> None:
    image = ImagePart(picture((9, 9, 9), (90, 30)))
    several = Processor(SEVERAL, tokenizer)
    [alone], [first, _] = several.layouts([image]), several.layouts([image, image])
    plain = image_key(image.source)
    assert (several.key(image, alone), several.key(image, first)) == (plain, f"{plain}-square")
    assert several.key(image, first, mirror=True) == f"{plain}-square-mirror"
    assert processor.key(image, processor.layouts([image])[0]) == plain  # as caches of features have it


def asked(count: int) -> Conversation:
    return Conversation((user_message("What?", [picture((n, 0, 0), (90, 30)) for n in range(count)]),))


def test_without_tiles_a_picture_is_not_opened_to_be_counted(processor: Processor) -> None:
    assert processor.layouts([ImagePart("no such file")]) == (Layout(4),)


def test_pictures_are_wrapped_in_special_tokens(tokenizer: Tokenizer) -> None:
    wrapped = Processor(dataclasses.replace(CONFIG, image_wrap=("<|im_start|>", "<|endoftext|>")), tokenizer)
    plain = Processor(CONFIG, tokenizer)
    before, after = tokenizer.special["<|im_start|>"], tokenizer.special["<|endoftext|>"]
    conversation = row(images=2)
    ids, bare = (p.training_sample(conversation).input_ids.tolist() for p in (wrapped, plain))
    one = [IMAGE_TOKEN] * 4
    start, second = bare.index(IMAGE_TOKEN), len(bare) - bare[::-1].index(IMAGE_TOKEN) - 4
    between = bare[start + 4 : second]
    around = [before, *one, after]
    assert ids == [*bare[:start], *around, *between, *around, *bare[second + 4 :]]
    labels = wrapped.training_sample(conversation).labels
    assert (labels != IGNORE).sum() == plain.training_sample(conversation).supervised


def test_a_wrapping_that_the_tokenizer_lacks_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="image_wrap names '<im_start>', which is no special token"):
        Processor(dataclasses.replace(CONFIG, image_wrap=("<im_start>", "<im_end>")), tokenizer)


def test_no_pictures_are_no_pixels(processor: Processor) -> None:
    assert processor.pixels((), ()).shape == (0, 3, 64, 64)
    assert processor.training_sample(row(images=0)).images == ()


def test_a_question_that_the_template_drops_is_refused(tokenizer: Tokenizer) -> None:
    plain = Processor(dataclasses.replace(CONFIG, template="plain"), tokenizer)
    with pytest.raises(InputError, match="'plain' sees pictures only"):
        plain.prompt(Conversation((user_message("What?"),)))


def test_both_lengths_are_in_the_message(processor: Processor) -> None:
    long = row("?! " * 80)
    with pytest.raises(InputError, match=r"^conversation 'r1' takes \d+ tokens, the model's context is 128$"):
        processor.training_sample(long)
    with pytest.raises(InputError, match=r"^the conversation takes \d+ tokens, the model's context is 128$"):
        processor.prompt(Conversation((user_message("?! " * 80),)))


def test_a_conversation_may_fill_the_context_exactly(tokenizer: Tokenizer) -> None:
    length = len(Processor(CONFIG, tokenizer).training_sample(row()).input_ids)
    for context, fits in ((length, True), (length - 1, False)):
        config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, context=context))
        exact = Processor(config, tokenizer)
        if fits:
            assert len(exact.training_sample(row()).input_ids) == length
        else:
            with pytest.raises(
                InputError, match=f"takes {length} tokens, the model's context is {length - 1}"
            ):
                exact.training_sample(row())


def test_conversations_are_checked(processor: Processor) -> None:
    with pytest.raises(InputError, match="conversation 'r1': message 2 is an empty answer"):
        processor.training_sample(row(" "))
    with pytest.raises(InputError, match="the last question has no answer"):
        processor.training_sample(Conversation((user_message("Hi"),)))
    with pytest.raises(InputError, match="the last message must be a question"):
        processor.prompt(row())


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer: Tokenizer) -> None:
    small = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, vocab_size=100))
    size = len(tokenizer)
    with pytest.raises(InputError, match=f"the tokenizer has {size} tokens, the embedding only 100 rows"):
        Processor(small, tokenizer)


def test_an_unknown_template_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="unknown template 'chatm'; did you mean 'chatml'"):
        Processor(dataclasses.replace(CONFIG, template="chatm"), tokenizer)


def test_a_text_that_cannot_fit_is_not_tokenized(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[int] = []
    pieces = Tokenizer.pieces

    def counted(tokenizer: Tokenizer, text: str, **more: bool) -> list[tuple[int, int]]:
        tokenized.append(len(text))
        return pieces(tokenizer, text, **more)

    monkeypatch.setattr(Tokenizer, "pieces", counted)
    for text, seen in (("What? " * 60, True), ("What? " * 1_000_000, False)):
        with pytest.raises(InputError, match=r"context is 128|the limit is 128"):
            processor.prompt(Conversation((user_message(text),)))
        assert (sum(tokenized) > 0) is seen
        tokenized.clear()
