"""Map each image token to the part of the original image that it shows.

This file follows a pixel backwards, by `pumice.geometry.Placement`. A test sends bright pixels forwards
through `pumice.images` and checks that they meet. A token's box is the patch of pixels that its feature
belongs to. The feature also depends on its surroundings, which no map can show.

Shapes: N tokens of one image, W words, h x w cells of a map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from pumice.capability import IMAGE, Capability, fields
from pumice.config import ConnectorConfig, ImagePolicy, ModelConfig
from pumice.geometry import Axis, Layout, Size, first_tile_placement, placement

# What decides where a token lies in the picture, besides how its pixels are normalised.
CAPABILITY = Capability(
    "the map of a picture's tokens",
    {
        ImagePolicy: fields(IMAGE),
        # Their token n stands for the n-th block of features; that of another reduction may not.
        ConnectorConfig: fields("kind factor bias", reduce=("none", "average", "pixel_shuffle")),
    },
)


@dataclass(frozen=True)
class TokenBoxes:
    """The box of each token of one image.

    boxes (N, 4): left, top, right, bottom in pixels of the original, upright image. They reach beyond it if a
    token also shows padding. placed (N,): False for tokens that show no part of the image (the class token,
    the newline at the end of a row of tiles); their box is empty.
    """

    size: Size
    boxes: np.ndarray
    placed: np.ndarray

    def inside(self) -> np.ndarray:
        """Return the share of each token's box that is image, not padding: (N,); 0 for an empty box."""
        width, height = self.size
        x = _covered(self.boxes[:, 0], self.boxes[:, 2], np.array([0.0, width]))[:, 0]
        y = _covered(self.boxes[:, 1], self.boxes[:, 3], np.array([0.0, height]))[:, 0]
        return x * y

    def paint(self, weights: np.ndarray, grid: Size) -> np.ndarray:
        """Turn weights (..., N) into heat (..., h, w) on a grid of (w, h) equal cells over the image.

        A token's weight is spread evenly over its box. Weight that lies on padding or on an empty box is left
        out, so the sum of a map is the weight that lies in the image.
        """
        width, height = self.size
        x = _covered(self.boxes[:, 0], self.boxes[:, 2], np.linspace(0, width, grid[0] + 1))  # (N, w)
        y = _covered(self.boxes[:, 1], self.boxes[:, 3], np.linspace(0, height, grid[1] + 1))  # (N, h)
        return np.einsum("...n,nh,nw->...hw", weights, y, x, optimize=True)


def token_boxes(config: ModelConfig, size: Size, layout: Layout) -> TokenBoxes:
    """Return the boxes of one image's tokens, in order. size: (width, height) of the upright image."""
    CAPABILITY.check(config.image)
    CAPABILITY.check(config.connector)
    # 1. The tokens of the first tile, which shows the whole image.
    if layout.pool or layout.average:  # a frame of a video, which is squashed, or cropped
        side = layout.pool or math.isqrt(layout.base)
        cell = layout.average * config.vision.stride or config.vision.image_size / side
        policy = replace(config.image, mode="crop" if layout.average else "squash")
        place = first_tile_placement(policy, config.vision.image_size, size)
        boxes = _grid(place.across, place.down, side, cell)
        boxes = np.vstack((boxes, *[np.zeros((1, 4))] * layout.newline))
        return TokenBoxes(size, boxes, np.arange(layout.tokens) < layout.base)
    place = first_tile_placement(config.image, config.vision.image_size, size, tiled=layout.tiles > 1)
    boxes = _grid(place.across, place.down, *_tokens(config))
    placed = np.ones(len(boxes), bool)
    if config.vision.select == "cls_patch":
        boxes, placed = np.vstack((np.zeros((1, 4)), boxes)), np.append(False, placed)
    # 2. The tokens of the other tiles follow. Under split they come before, and each tile by itself.
    if layout.tiles > 1 and config.image.mode in ("split", "grid"):
        tile_boxes = _whole_tiles(config, size, layout)
        parts = (tile_boxes, boxes) if config.image.mode == "split" else (boxes, tile_boxes)
        return TokenBoxes(size, np.vstack(parts), np.ones(layout.tokens, bool))
    if config.image.mode == "anyres":
        tile_boxes, tile_placed = _tiles(config, size, layout)
        boxes, placed = np.vstack((boxes, tile_boxes)), np.append(placed, tile_placed)
    return TokenBoxes(size, boxes, placed)


def grid_for(boxes: TokenBoxes) -> Size:
    """Return (w, h) of a map: the image's shape, two cells per token of its finest along the longer side.

    It has at least 48 cells there, so that few tokens look smooth, and at most 320.
    """
    size, sides = boxes.size, (boxes.boxes[:, 2:] - boxes.boxes[:, :2])[boxes.placed]
    tokens = np.array(size) / sides.min(0, initial=max(size), where=sides > 0)  # along width and height
    scale = min(max(48, round(2 * tokens.max())), 320) / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _grid(across: Axis, down: Axis, side: int, cell: float) -> np.ndarray:
    """Return the boxes of a tile's side x side tokens of `cell` pixels, row by row: (side * side, 4)."""
    begin = np.arange(side) * cell
    x, y = (np.stack((axis(begin), axis(begin + cell))) for axis in (across, down))
    return _boxes(x, y)


def _tokens(config: ModelConfig) -> tuple[int, int]:
    """Return the tokens on a side of one tile, and the pixels on a side of one token."""
    factor = 1 if config.connector.reduce == "none" else config.connector.factor
    return config.vision.grid // factor, config.vision.stride * factor


def _tiles(config: ModelConfig, size: Size, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes and `placed` of an anyres image's tokens after those of the first tile."""
    place, spans = placement(config, size), []
    # 1. Along each axis: the first and last pixel of each column or row of tokens.
    for axis, cut, count, tiles in zip(
        (place.across, place.down), (layout.left, layout.top), (layout.width, layout.height),
        (layout.columns, layout.rows), strict=True,
    ):  # fmt: skip
        side, _ = _tokens(config)
        # `count` tokens share what is left of the side * tiles columns (rows) after the padding is cut off.
        edges = cut + np.arange(count + 1) * ((side * tiles - 2 * cut) / max(count, 1))
        begin, end = _pixels(edges[:-1], config, last=False), _pixels(edges[1:], config, last=True)
        spans.append(np.stack((axis(begin), axis(end))))
    boxes = _boxes(*spans).reshape(layout.height, layout.width, 4)
    placed = np.ones(boxes.shape[:2], bool)
    # 2. A newline token ends each row. It shows nothing.
    if layout.newline:
        boxes = np.concatenate((boxes, np.zeros((layout.height, 1, 4))), 1)
        placed = np.concatenate((placed, np.zeros((layout.height, 1), bool)), 1)
    return boxes.reshape(-1, 4), placed.reshape(-1)


def _whole_tiles(config: ModelConfig, size: Size, layout: Layout) -> np.ndarray:
    """Return the boxes of the tokens of tiles that share the whole image: (tiles * side * side, 4)."""
    scale_x, scale_y = size[0] / layout.columns, size[1] / layout.rows
    across, down = (Axis(part / config.vision.image_size, 0) for part in (scale_x, scale_y))
    first = _grid(across, down, *_tokens(config))
    corners = [
        (column * scale_x, row * scale_y) for row in range(layout.rows) for column in range(layout.columns)
    ]
    return np.vstack([first + np.array((x, y, x, y)) for x, y in corners])


def _pixels(edges: np.ndarray, config: ModelConfig, *, last: bool) -> np.ndarray:
    """Convert edges, counted in tokens along the tiles, to pixels. A tile may end in pixels without token."""
    side, cell = _tokens(config)
    tile = np.ceil(edges / side) - 1 if last else np.floor(edges / side)
    return tile * config.vision.image_size + (edges - tile * side) * cell


def _boxes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Combine starts and ends along each axis, (2, columns) and (2, rows), to boxes (rows * columns, 4)."""
    columns, rows = x.shape[1], y.shape[1]
    left, right = (np.tile(edge, rows) for edge in x)
    top, bottom = (np.repeat(edge, columns) for edge in y)
    return np.stack((left, top, right, bottom), 1)


def _covered(begin: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the share of each interval (N,) that lies in each cell between two edges (c + 1): (N, c)."""
    low = np.maximum(begin[:, None], edges[None, :-1])
    high = np.minimum(end[:, None], edges[None, 1:])
    length = (end - begin)[:, None]
    return np.divide(np.maximum(high - low, 0), length, out=np.zeros_like(low), where=length > 0)
