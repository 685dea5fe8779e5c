"""Configs: to JSON and back without loss, and strict about every key and type."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pumice.config import (
    FORMAT_VERSION,
    REDUCTIONS,
    ConnectorConfig,
    DecoderConfig,
    GenerationConfig,
    ImagePolicy,
    LoraConfig,
    ModelConfig,
    VisionConfig,
)
from pumice.config_json import as_stored, from_dict
from pumice.errors import NEWER, InputError

DECODER = DecoderConfig(vocab_size=100, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=64)


def plain() -> dict[str, Any]:
    """A config as it is read from a file."""
    return json.loads(json.dumps(ModelConfig(DECODER, lora=LoraConfig()).to_dict()))


decoders = st.builds(
    DecoderConfig,
    vocab_size=st.integers(1, 10**6),
    width=st.integers(1, 10**4),
    depth=st.integers(1, 99),
    heads=st.just(8),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.integers(1, 128).map(lambda n: 2 * n),
    mlp_width=st.integers(1, 10**5),
    context=st.integers(1, 10**6),
    rope_theta=st.floats(1, 1e7),
    norm_eps=st.floats(1e-12, 1e-3),
    tied_head=st.booleans(),
    qkv_bias=st.booleans(),
    qk_norm=st.booleans(),
    sliding_window=st.none() | st.integers(1, 10**5),
)
models = st.builds(
    ModelConfig,
    decoder=decoders,
    vision=st.builds(VisionConfig, image_size=st.integers(1, 40).map(lambda n: 14 * n), stride=st.just(14)),
    connector=st.builds(ConnectorConfig, kind=st.text(), reduce=st.sampled_from(["none", *REDUCTIONS])),
    image=st.builds(
        ImagePolicy, mean=st.tuples(*[st.floats(0, 1)] * 3), pad_color=st.tuples(*[st.integers(0, 255)] * 3)
    ),
    template=st.text(),
    stop_token_ids=st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    lora=st.none() | st.builds(LoraConfig, rank=st.integers(1, 512), targets=st.lists(st.text()).map(tuple)),
)


@given(models)
def test_a_config_survives_json(config: ModelConfig) -> None:
    written = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(written)) == config


def test_reading_does_not_change_what_was_given() -> None:
    values = plain()
    ModelConfig.from_dict(values)
    assert values == plain()


def test_left_out_keys_take_their_defaults() -> None:
    values = {"pumice_format": FORMAT_VERSION, "decoder": as_stored(DECODER)}
    assert ModelConfig.from_dict(values) == ModelConfig(DECODER)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("decoder", "widht"), 3, "config.json: decoder: unknown key 'widht'; did you mean 'width'?"),
        (("tempalte",), "x", "config.json: unknown key 'tempalte'; did you mean 'template'?"),
        (("zzz",), 1, f"config.json: unknown key 'zzz'{NEWER}"),
        *(
            ((section, "zzz"), 1, f"config.json: {section}: unknown key 'zzz'{NEWER}")
            for section in ("decoder", "vision", "connector", "image", "lora")
        ),
        (("decoder", "depth"), "2", "config.json: decoder: depth: expected int, found '2'"),
        (("decoder", "depth"), 2.0, "config.json: decoder: depth: expected int, found 2.0"),
        (("decoder", "depth"), True, "config.json: decoder: depth: expected int, found True"),
        (("decoder", "depth"), None, "config.json: decoder: depth: expected int, found None"),
        (("decoder", "rope_base"), "1e4", "config.json: decoder: rope_base: expected float, found '1e4'"),
        (("decoder", "rope_base"), False, "config.json: decoder: rope_base: expected float, found False"),
        (("decoder", "tied_head"), 1, "config.json: decoder: tied_head: expected bool, found 1"),
        (("decoder", "sliding_window"), "4", "config.json: decoder: sliding_window: expected int, found '4'"),
        (("image", "mean"), [0.5, 0.5], "config.json: image: mean: expected 3 values, found 2"),
        (("image", "mean"), 0.5, "config.json: image: mean: expected a list, found 0.5"),
        (("image", "pad_color"), [1, 2, 3.5], "config.json: image: pad_color: expected int, found 3.5"),
        (("stop_token_ids",), ["2"], "config.json: stop_token_ids: expected int, found '2'"),
        (("lora", "targets"), "q", "config.json: lora: targets: expected a list, found 'q'"),
        (("vision",), [], "config.json: vision: expected an object for VisionConfig, found list"),
        (
            ("vision", "image_size"),
            250,
            "config.json: vision: image size 250 is not a multiple of the tower's stride 32",
        ),
        (("decoder", "kv_heads"), 3, "config.json: decoder: 4 heads cannot share 3 key/value heads evenly"),
        (("decoder", "kv_heads"), 0, "config.json: decoder: kv_heads must be 1 or more, not 0"),
        (
            ("decoder", "depth"),
            10**9,
            "config.json: decoder: depth must be 1000 or less, not 1000000000",
        ),
        (
            ("decoder", "width"),
            2**70,
            "config.json: decoder: width must be 1048576 or less, not 1180591620717411303424",
        ),
        (
            ("decoder", "context"),
            10**9,
            "config.json: decoder: context must be 16777216 or less, not 1000000000",
        ),
        (("vision", "depth"), 10**6, "config.json: vision: depth must be 1000 or less, not 1000000"),
        (
            ("decoder", "rope_base"),
            10**400,
            "config.json: decoder: rope_base: expected a finite number, found "
            f"1{'0' * 199}... (401 characters)",
        ),
        (
            ("decoder", "norm_eps"),
            float("nan"),
            "config.json: decoder: norm_eps: expected a finite number, found nan",
        ),
        (("decoder", "width"), -64, "config.json: decoder: width must be 1 or more, not -64"),
        (
            ("decoder", "head_width"),
            7,
            "config.json: decoder: rotary positions turn pairs; a head_dim of 7 has none",
        ),
        (
            ("decoder", "rope_scaling"),
            {"kind": "yarn", "factor": 2.0},
            "config.json: decoder: rope_scaling: unknown kind 'yarn'; use one of linear, llama3",
        ),
        (("vision", "stride"), 0, "config.json: vision: stride must be 1 or more, not 0"),
        (("connector", "factor"), 0, "config.json: connector: factor must be 1 or more, not 0"),
        *[
            (
                ("image", "std"),
                std,
                f"config.json: image: pixels cannot be divided by a std of {tuple(std)}; use 1e-06 to 1e+06",
            )
            for std in ([0.0, 1.0, 1.0], [1.0, 1.0, 1e300])
        ],
        (
            ("image", "mean"),
            [0.5, 0.5, 1e30],
            "config.json: image: a mean of (0.5, 0.5, 1e+30) cannot be that of pixels from 0 to 1",
        ),
        (
            ("image", "pad_color"),
            [0, 256, 0],
            "config.json: image: pad_color is (0, 256, 0); each part must be from 0 to 255",
        ),
        (("lora", "rank"), 0, "config.json: lora: rank must be 1 or more, not 0"),
        (
            ("generation",),
            {"temperature": 1.0, "zzz": 1},
            f"config.json: generation: unknown key 'zzz'{NEWER}",
        ),
        (
            ("chat",),
            {"user": ["", ""], "assistant": "", "stop": "x", "zzz": 1},
            f"config.json: chat: unknown key 'zzz'{NEWER}",
        ),
        (
            ("pumice_format",),
            7,
            f"config.json has pumice_format 7, this version reads {FORMAT_VERSION}; update Pumice, or write "
            "the folder anew with a version that reads it",
        ),
        (
            ("pumice_format",),
            str(FORMAT_VERSION),
            f'config.json has pumice_format "{FORMAT_VERSION}", this version reads {FORMAT_VERSION}; '
            "update Pumice, or write the folder anew with a version that reads it",
        ),
    ],
)
def test_wrong_values_are_named_with_their_place(path: tuple[str, ...], value: Any, message: str) -> None:
    values = plain()
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(InputError) as caught:
        ModelConfig.from_dict(values)
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["vocab_size", "mlp_width"])
def test_missing_keys_are_named(key: str) -> None:
    values = plain()
    del values["decoder"][key]
    with pytest.raises(InputError, match=f"config.json: decoder: the key '{key}' is missing"):
        ModelConfig.from_dict(values)


def test_a_file_without_a_version_is_not_ours() -> None:
    values = plain()
    del values["pumice_format"]
    with pytest.raises(InputError, match=r"^config\.json has pumice_format null"):
        ModelConfig.from_dict(values)


def test_whole_numbers_become_floats_where_floats_stand() -> None:
    policy = from_dict(ImagePolicy, {"mean": [0, 1, 0]}, "image")
    assert policy.mean == (0.0, 1.0, 0.0)
    assert all(type(value) is float for value in policy.mean)


@pytest.mark.parametrize(
    ("size", "connector", "tokens"),
    [
        (256, ConnectorConfig(), 64),
        (336, ConnectorConfig("linear"), 576),
        (336, ConnectorConfig("linear", "average", 2), 144),
        (336, ConnectorConfig("linear", "pixel_shuffle", 24), 1),
    ],
)
def test_image_tokens(size: int, connector: ConnectorConfig, tokens: int) -> None:
    vision = VisionConfig(image_size=size, stride=32 if size == 256 else 14)
    assert ModelConfig(DECODER, vision, connector).image_tokens == tokens


def test_a_class_token_is_counted_and_is_in_no_square() -> None:
    vision = VisionConfig("clip", image_size=64, stride=8, select="cls_patch")
    assert ModelConfig(DECODER, vision).image_tokens == vision.features == 65
    assert VisionConfig("siglip", image_size=70, stride=8, select="full").features == 64
    with pytest.raises(InputError, match="a class token cannot be reduced"):
        ModelConfig(DECODER, vision, ConnectorConfig(reduce="average", factor=2))


def test_only_tiles_need_pinpoints_and_they_come_back_from_json() -> None:
    policy = ImagePolicy("anyres", pinpoints=((256, 512), (512, 512)), max_tiles=9)
    config = ModelConfig(DECODER, image=policy)
    assert config.has_newline and not ModelConfig(DECODER).has_newline
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match=r"anyres needs image\.pinpoints"):
        ModelConfig(DECODER, image=ImagePolicy("anyres"))


def test_several_pictures_are_squares_where_tiles_shrink() -> None:
    tiles = ImagePolicy("anyres", pinpoints=((256, 512), (512, 512)))
    assert (tiles.several, dataclasses.replace(tiles, several=None, max_tiles=9).several) == (
        "tiles", "square"
    )  # fmt: skip
    assert dataclasses.replace(tiles, max_tiles=9).several == "tiles"  # what was said stays
    assert ImagePolicy().several is None
    assert [tiles.uses_tiles(count) for count in (1, 2)] == [True, True]
    tiles = dataclasses.replace(tiles, several="square")
    assert [tiles.uses_tiles(count) for count in (1, 2)] == [True, False]
    assert not ImagePolicy(several="tiles").uses_tiles(1)
    with pytest.raises(InputError, match="unknown several 'crops'; use one of tiles, square"):
        ImagePolicy(several="crops")


def test_a_cache_of_features_outlives_the_choice_for_several_pictures() -> None:
    policy = ImagePolicy("anyres", pinpoints=((256, 512),), max_tiles=9)
    assert repr(policy) == (
        "ImagePolicy(mode='anyres', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), "
        "resample='bicubic', pad_color=(124, 116, 104), pinpoints=((256, 512),), unpad=True, max_tiles=9)"
    )


def test_unknown_choices_and_squares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="unknown mode 'stretch'; use one of pad, crop, squash, anyres"):
        ImagePolicy(mode="stretch")
    with pytest.raises(InputError, match="unknown resample 'nearest'; use one of bicubic, bilinear"):
        ImagePolicy(resample="nearest")
    with pytest.raises(InputError, match="8 x 8 features cannot be reduced by 3"):
        ModelConfig(DECODER, connector=ConnectorConfig(reduce="average", factor=3))


def test_pictures_of_too_many_tiles_are_refused() -> None:
    vision = VisionConfig(image_size=64, stride=8)
    ModelConfig(DECODER, vision, image=ImagePolicy("split", longest_edge=32 * 64))
    with pytest.raises(InputError, match="longest_edge 2049 is more than 32 tiles of 64 pixels"):
        ModelConfig(DECODER, vision, image=ImagePolicy("split", longest_edge=32 * 64 + 1))


@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.1])
def test_a_dropout_that_teaches_nothing_is_refused(dropout: float) -> None:
    LoraConfig(dropout=0.0)
    with pytest.raises(InputError, match=r"dropout is .*at least 0 and less than 1"):
        LoraConfig(dropout=dropout)


def test_fields_that_came_later_are_written_only_where_they_say_something() -> None:
    plain = ModelConfig(DECODER)
    assert "generation" not in plain.to_dict() and "also_stride" not in plain.to_dict()["vision"]
    assert ModelConfig.from_dict(plain.to_dict()) == plain
    vision = VisionConfig(width=1280 + 4 * 120, also_stride=16)
    full_config = dataclasses.replace(
        plain, vision=vision, generation=GenerationConfig(repetition_penalty=1.2)
    )
    assert full_config.to_dict()["generation"]["repetition_penalty"] == 1.2
    assert full_config.to_dict()["vision"]["also_stride"] == 16
    assert ModelConfig.from_dict(full_config.to_dict()) == full_config
    assert "also_stride" not in repr(full_config)  # or feature caches would change their fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give 0 (greedy) or more"),
        ({"top_p": 0.0}, "top_p is 0.0; give more than 0, at most 1"),
        ({"top_k": -1}, "top_k is -1; give 0 (off) or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; give 0.01 to 1000000.0"),
        ({"temperature": float("nan")}, "temperature is nan; give 0 (greedy) or more"),
        ({"num_beams": 0}, "num_beams is 0; give 1 (off) to 64"),
        (
            {"num_beams": 3, "temperature": 0.2, "repetition_penalty": 1.1},
            "num_beams is 3, which does not go with temperature and repetition_penalty; give num_beams 1, or "
            "temperature 0 and repetition_penalty 1",
        ),
    ],
)
def test_how_answers_are_drawn_is_checked_as_it_is_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        GenerationConfig(**fields)


def test_a_message_cuts_off_the_long_words_of_a_file() -> None:
    with pytest.raises(InputError) as refusal:
        from_dict(ModelConfig, {"x" * 5000: 1}, "config.json")
    assert str(refusal.value).count("x") < 250 and "5002 characters" in str(refusal.value)
    assert str(InputError(f"{'y' * 5000} is no model")) == f"{'y' * 200}... (5000 characters) is no model"
