"""Where a token lies: sent forwards through the real preparation of pictures, light must come out there."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from pumice.config import REDUCTIONS, ConnectorConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.explain.maps import TokenBoxes, grid_for, token_boxes
from pumice.geometry import Layout, frame_layout, image_layout, single_tile_layout
from pumice.images import to_tiles
from pumice.media import VideoPolicy
from pumice.model.connector import arrange, average

PLAIN = ImagePolicy(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), pad_color=(0, 0, 0))
TILES = ((84, 168), (168, 84), (168, 168), (252, 84), (84, 252))


def config_of(models: ModuleType, name: str) -> ModelConfig:
    """84 pixels in 6 x 6 patches, or 3 x 3 squares of them; one policy has a rest that no patch shows."""
    vision = replace(models.CLIP, image_size=84)
    connector = ConnectorConfig()
    policy = PLAIN
    if name in ("crop", "squash"):
        policy = replace(PLAIN, mode=name)
    elif name == "rest":
        vision = replace(vision, image_size=90)
    elif name == "class token":
        vision = replace(vision, select="cls_patch")
    elif name in ("average", "pixel_shuffle"):
        connector = ConnectorConfig(reduce=name, factor=2)
    elif name == "efficientnet":
        vision = VisionConfig(image_size=192, variant="lite0")
    elif name.startswith("anyres"):
        policy = replace(PLAIN, mode="anyres", pinpoints=TILES, unpad="unpad" in name)
        if "several" in name:
            policy = replace(policy, several="square")
        if "shrunk" in name:
            policy = replace(policy, max_tiles=1)
        if "rest" in name:
            vision = replace(vision, image_size=90)
            policy = replace(policy, pinpoints=tuple((w // 84 * 90, h // 84 * 90) for w, h in TILES))
    return ModelConfig(models.DECODER, vision, connector, policy)


def layout_of(config: ModelConfig, name: str, size: tuple[int, int]) -> Layout:
    return image_layout(config, size, images=2 if "several" in name else 1)


NAMES = (
    "pad", "crop", "squash", "rest", "class token", "average", "pixel_shuffle", "efficientnet",
    "anyres", "anyres unpad", "anyres unpad rest", "anyres unpad shrunk", "anyres unpad several",
    "anyres several",
)  # fmt: skip


def brightness(config: ModelConfig, picture: Image.Image, layout: Layout) -> np.ndarray:
    """How bright the patch of each image token is, in their order: (N,); -1 for a line's end."""
    measured = to_tiles(picture, config.vision.image_size, config.image, tiles=layout.tiles > 1)[:, 0]
    stride, grid = config.vision.stride, config.vision.grid
    cells = measured[:, : stride * grid, : stride * grid].reshape(len(measured), grid, stride, grid, stride)
    tokens = torch.from_numpy(cells.mean((2, 4)).reshape(len(measured), -1, 1))
    if config.connector.reduce != "none":
        tokens = average(tokens, config.connector.factor)
    if config.image.mode == "anyres":
        return arrange(tokens, layout, torch.full((1,), -1.0) if layout.newline else None)[:, 0].numpy()
    values = tokens[0, :, 0].numpy()
    return np.append(-1, values) if config.vision.select == "cls_patch" else values


def expected(boxes: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The share of each token's box that a white rectangle fills: (N,)."""
    wide = np.minimum(boxes[:, 2], box[2]) - np.maximum(boxes[:, 0], box[0])
    tall = np.minimum(boxes[:, 3], box[3]) - np.maximum(boxes[:, 1], box[1])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.divide(wide.clip(0) * tall.clip(0), area, out=np.full(len(boxes), -1.0), where=area > 0)


# The blur of resampling at the edges of a rectangle.
CLOSE = 0.3


@pytest.mark.parametrize("name", NAMES)
@hypothesis_settings(max_examples=25)
@given(st.integers(60, 300), st.integers(60, 300), st.data())
def test_light_comes_out_where_the_map_says(
    models: ModuleType, name: str, width: int, height: int, data: st.DataObject
) -> None:
    assume(max(width, height) < 3 * min(width, height))
    config = config_of(models, name)
    left, top = data.draw(st.integers(0, width * 2 // 3)), data.draw(st.integers(0, height * 2 // 3))
    box = (left, top, left + width // 3, top + height // 3)
    picture = Image.new("RGB", (width, height))
    picture.paste((255, 255, 255), box)
    layout = layout_of(config, name, picture.size)
    token_map = token_boxes(config, picture.size, layout)
    assert len(token_map.boxes) == layout.tokens
    measured, predicted = brightness(config, picture, layout), expected(token_map.boxes, box)
    assert np.array_equal(measured == -1, predicted == -1)
    assert np.array_equal(token_map.placed, predicted != -1)
    if "shrunk" not in name:  # interpolation looks at the middle of what it shrinks
        assert np.abs(measured - predicted).max() < CLOSE
    assert np.abs(measured - predicted).mean() < CLOSE / 4


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_painted_onto_its_own_box(models: ModuleType, name: str) -> None:
    config, size = config_of(models, name), (120, 80)
    layout = layout_of(config, name, size)
    token_map = token_boxes(config, size, layout)
    maps = token_map.paint(np.eye(layout.tokens), size)
    assert maps.shape == (layout.tokens, 80, 120)
    assert np.allclose(maps.sum((1, 2)), token_map.inside())
    for heat, (left, top, right, bottom), placed in zip(maps, token_map.boxes, token_map.placed, strict=True):
        rows, columns = np.nonzero(heat > 1e-12)
        assert placed or not len(rows)
        if len(rows):
            assert (columns.min(), rows.min()) == (max(0, int(left + 1e-9)), max(0, int(top + 1e-9)))
            assert columns.max() < min(120, right + 1e-9) <= 120
            assert rows.max() < min(80, bottom + 1e-9) <= 80


@pytest.mark.parametrize(("averaged", "mode"), [(True, "crop"), (False, "squash")])
@pytest.mark.parametrize("size", [(200, 120), (120, 200)])
def test_a_frame_of_a_video(models: ModuleType, averaged: bool, mode: str, size: tuple[int, int]) -> None:
    """A frame of LLaVA-NeXT-Video is cropped, one of LLaVA-OneVision squashed; both to 3 x 3 tokens here."""
    config = config_of(models, "anyres unpad")
    video = VideoPolicy(pool=2, average=averaged)
    layout = frame_layout(replace(config, video=video), last=False)
    picture, box = Image.new("RGB", size), (70, 50, 110, 90)
    picture.paste((255, 255, 255), box)
    token_map = token_boxes(replace(config, video=video), size, layout)
    # Two by two features become a token in both, by their mean.
    shown = replace(
        config, image=replace(config.image, mode=mode), connector=ConnectorConfig(reduce="average", factor=2)
    )
    measured = brightness(shown, picture, single_tile_layout(shown))
    assert len(token_map.boxes) == layout.tokens == len(measured) == 9
    assert np.abs(measured - expected(token_map.boxes, box)).max() < CLOSE / 4


def test_padding_is_a_share_and_not_drawn(models: ModuleType) -> None:
    config = config_of(models, "pad")
    token_map = token_boxes(
        config, (200, 100), single_tile_layout(config)
    )  # 50 pixels of padding above and below
    inside = token_map.inside().reshape(6, 6)
    assert np.allclose(inside[:, 0], [0, 0.5, 1, 1, 0.5, 0])
    evenly = token_map.paint(np.full(36, 1 / 36), (20, 10))
    assert np.allclose(evenly, 0.5 / 200)  # half of the heat, evenly over the picture


def test_the_ends_that_crop_cuts_off_stay_dark(models: ModuleType) -> None:
    config = config_of(models, "crop")
    heat = token_boxes(config, (300, 100), single_tile_layout(config)).paint(np.full(36, 1 / 36), (30, 10))
    assert np.allclose(heat[:, 10:20], 1 / 100)
    assert not heat[:, :10].any()
    assert not heat[:, 20:].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (5000, 3)])
def test_pictures_of_any_shape(models: ModuleType, name: str, size: tuple[int, int]) -> None:
    config = config_of(models, name)
    layout = layout_of(config, name, size)
    token_map = token_boxes(config, size, layout)
    grid = grid_for(token_map)
    assert 48 <= max(grid) <= 320
    assert min(grid) >= 1
    heat = token_map.paint(np.full(layout.tokens, 1 / layout.tokens), grid)
    assert np.isfinite(heat).all()
    assert 0 < heat.sum() <= 1 + 1e-9


@example(1, 1)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_grid_has_the_picture_s_shape(width: int, height: int) -> None:
    boxes = np.array([[0, 0, width, height]], float)
    across, down = grid_for(TokenBoxes((width, height), boxes, np.ones(1, bool)))
    assert abs(across / 48 - width / max(width, height)) <= 1 / 48
    assert abs(down / 48 - height / max(width, height)) <= 1 / 48


@pytest.mark.parametrize(("side", "cells"), [(4, 48), (24, 48), (72, 144), (400, 320)])
def test_more_tokens_make_a_finer_map(side: int, cells: int) -> None:
    edges = np.arange(side) * (1200 / side)
    left, top = (axis.reshape(-1) for axis in np.meshgrid(edges, edges))
    boxes = np.stack((left, top, left + 1200 / side, top + 1200 / side), 1)
    token_map = TokenBoxes((1200, 1200), boxes, np.ones(side * side, bool))
    assert grid_for(token_map) == (cells, cells)


def test_a_reduction_of_unknown_places_has_no_map(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may stand for any features there; boxes of blocks would be wrong."""
    monkeypatch.setitem(REDUCTIONS, "strips", REDUCTIONS["average"])
    config = config_of(models, "average")
    config = replace(config, connector=replace(config.connector, reduce="strips"))
    with pytest.raises(InputError, match=r"the map of .* does not implement reduce = 'strips'"):
        token_boxes(config, (84, 84), single_tile_layout(config))
