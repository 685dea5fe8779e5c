"""anyres: resolutions, tiles and token counts, as haotian-liu/LLaVA recorded them and as in transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.geometry import Layout, best_resolution, letterbox, single_tile_layout, tile_layout
from pumice.model.connector import arrange

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
GOLDEN = json.loads((Path(__file__).parent / "golden" / "anyres.json").read_text())
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def make(vision: VisionConfig | None = None, **policy: Any) -> ModelConfig:
    decoder = DecoderConfig(
        vocab_size=9, width=8, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8, context=9
    )
    vision = vision or VisionConfig("clip", image_size=336, stride=14, width=8, depth=1, heads=1, mlp_width=8)
    values = {"mode": "anyres", "pinpoints": PINPOINTS} | policy
    return ModelConfig(decoder, vision, image=ImagePolicy(**values))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: "x".join(map(str, c["size"])))
def test_the_recorded_geometry(case: dict[str, Any]) -> None:
    size = tuple(case["size"])
    assert best_resolution(size, PINPOINTS) == tuple(case["best_resolution"])
    layout = tile_layout(make(), size)
    assert [layout.columns, layout.rows] == case["grid"]
    assert [layout.height, layout.width] == case["unpadded"]
    assert layout.tokens == case["tokens"]
    # Which features are left: each feature of the tiles holds its own number.
    numbers = torch.arange(layout.columns * layout.rows * 576).view(-1, 576, 1)
    base = torch.full((1, 576, 1), -1)
    arranged = arrange(torch.cat((base, numbers)), layout, torch.tensor([-2]))
    assert arranged.shape == (case["tokens"], 1)
    assert arranged[:576].eq(-1).all()
    rows = arranged[576:].view(layout.height, layout.width + 1)
    assert rows[:, -1].eq(-2).all()
    inside = rows[:, :-1].flatten()
    assert (
        [inside[0].item(), inside[-1].item()] == [case["first"], case["last"]] if len(inside) else [None] * 2
    )


def test_the_first_of_equals_is_taken() -> None:
    assert best_resolution((336, 336), PINPOINTS) == (336, 672)
    assert best_resolution((336, 336), PINPOINTS[1:]) == (672, 336)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (1, 1), (2, 3)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    layout = tile_layout(make(), size)
    assert layout.tokens >= 576
    assert min(letterbox(size, best_resolution(size, PINPOINTS))) >= 1


@given(SIZES)
def test_the_picture_is_inside_the_tiles_and_touches_two_sides(size: tuple[int, int]) -> None:
    target = best_resolution(size, PINPOINTS)
    fitted = letterbox(size, target)
    assert fitted[0] <= target[0] and fitted[1] <= target[1]
    assert fitted[0] == target[0] or fitted[1] == target[1]


def test_one_square() -> None:
    config = make(mode="pad", pinpoints=())
    assert single_tile_layout(config) == Layout(576)
    assert (single_tile_layout(config).tiles, single_tile_layout(config).tokens) == (1, 576)


def test_reduced_tokens_are_laid_out_alike() -> None:
    full = make()
    halved = dataclasses.replace(full, connector=ConnectorConfig(reduce="average", factor=2))
    one, other = tile_layout(full, (1000, 1000)), tile_layout(halved, (1000, 1000))
    assert (one.height, one.width, one.base) == (48, 48, 576)
    assert (other.height, other.width, other.base) == (24, 24, 144)


def test_without_unpad_the_whole_map_stays() -> None:
    layout = tile_layout(make(unpad=False), (5, 2000))
    assert layout == Layout(576, columns=1, rows=3, height=72, width=24)
    assert layout.tokens == 4 * 576


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"anyres needs image\.pinpoints"):
        make(pinpoints=())
    with pytest.raises(InputError, match="pinpoint 336 x 500 is not a whole number of 336-pixel tiles"):
        make(pinpoints=((336, 500),))
    clip = VisionConfig("clip", image_size=336, stride=14, select="cls_patch")
    with pytest.raises(InputError, match="select cannot be cls_patch"):
        make(clip)


# --- transformers ---

# Of the 4 million sizes up to 2000 x 2000, transformers counts otherwise for 58: it rounds to seven places
# before it cuts off the fraction, LLaVA cuts off 14.999999999999998 as it is. (Among OneVision's 36 pinpoints
# for 126.) We follow LLaVA, whose weights these are.
ROUNDED = [(88, 55), (88, 99), (176, 110), (55, 176), (704, 396), (396, 704)]


def counts(kind: str, config: ModelConfig, size: tuple[int, int]) -> int:
    """The placeholders that transformers' processor writes for a picture."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    processor = object.__new__(getattr(transformers, kind))
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    processor.num_image_tokens = config.image_tokens
    processor.vision_aspect_ratio = "anyres_max_9"

    pinpoints = [[height, width] for width, height in config.image.pinpoints]
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    side = config.vision.image_size
    return processor._get_number_of_features(size[1], size[0], side, side)


@settings(max_examples=300)
@given(SIZES)
def test_counts_equal_those_of_llava_next(size: tuple[int, int]) -> None:
    config = make()
    assert tile_layout(config, size).tokens == counts("LlavaNextProcessor", config, size)


@pytest.mark.parametrize("size", ROUNDED)
def test_counts_differ_from_llava_next_only_by_rounding(size: tuple[int, int]) -> None:
    config = make()
    hf_counts, own_layout = counts("LlavaNextProcessor", config, size), tile_layout(config, size)
    long, short = max(own_layout.height, own_layout.width), min(own_layout.height, own_layout.width)
    assert hf_counts - own_layout.tokens in (2 * long, 2 * (long + 1), 2 * short, 2 * (short + 1))


ONEVISION = VisionConfig(
    "siglip", image_size=384, stride=14, width=8, depth=1, heads=1, mlp_width=8, select="full"
)
GRID = tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7))


@settings(max_examples=300)
@given(SIZES)
def test_counts_equal_those_of_llava_onevision(size: tuple[int, int]) -> None:
    config = make(ONEVISION, pinpoints=GRID, max_tiles=9)
    layout = tile_layout(config, size)
    assert layout.height * layout.width <= 9 * 27**2 * 1.1**2
    assert layout.tokens == counts("LlavaOnevisionProcessor", config, size)
