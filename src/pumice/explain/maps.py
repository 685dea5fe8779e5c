"""From a picture's tokens to its pixels: which part of the original picture each image token shows.

Knows sizes, image policies and layouts; numpy only. Does not know attention, words, or how pictures are
resized: this file follows a pixel backwards through `pumice.images` and `pumice.geometry`, and a test sends
bright pixels forwards through both to see that they meet.

A token's place is the patch of pixels that its feature stands for. A convolutional tower and the blocks of
a ViT let it know of its surroundings, too; no map can show that.

Shapes: N tokens of one picture, W words, h x w cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pumice.config import ModelConfig
from pumice.geometry import Layout, Size, best_resolution, letterbox
from pumice.images import LONGEST_CROPPED, LONGEST_PADDED


@dataclass(frozen=True)
class Axis:
    """Pixels of the tower's square to pixels of the original, along one side: at * scale + start."""

    scale: float
    start: float

    def __call__(self, at: np.ndarray) -> np.ndarray:
        return at * self.scale + self.start


@dataclass(frozen=True)
class Places:
    """Where the tokens of one picture lie in it.

    boxes (N, 4): left, top, right, bottom in pixels of the original picture, upright; they reach beyond it
    where a token shows padding, too. placed (N,): False for tokens that show no place of their own (the
    class token, the newline at the end of a row of tiles), whose box is empty.
    """

    size: Size
    boxes: np.ndarray
    placed: np.ndarray

    def inside(self) -> np.ndarray:
        """(N,): the share of each token's box that is picture, not padding; 0 without a place."""
        width, height = self.size
        x = _covered(self.boxes[:, 0], self.boxes[:, 2], np.array([0.0, width]))[:, 0]
        y = _covered(self.boxes[:, 1], self.boxes[:, 3], np.array([0.0, height]))[:, 0]
        return x * y

    def paint(self, weights: np.ndarray, grid: Size) -> np.ndarray:
        """Weights (..., N) -> heat (..., h, w) on a grid of (w, h) equal cells over the picture.

        A token's weight is spread evenly over its box, so that a map's sum is the weight that lies in the
        picture: what falls into padding is not drawn, and what has no place neither.
        """
        width, height = self.size
        x = _covered(self.boxes[:, 0], self.boxes[:, 2], np.linspace(0, width, grid[0] + 1))  # (N, w)
        y = _covered(self.boxes[:, 1], self.boxes[:, 3], np.linspace(0, height, grid[1] + 1))  # (N, h)
        return np.einsum("...n,nh,nw->...hw", weights, y, x, optimize=True)


def places(config: ModelConfig, size: Size, layout: Layout) -> Places:
    """The places of one picture's tokens, in their order. size: (width, height) of the upright picture."""
    alone = config.image.mode == "anyres" and layout.tiles == 1  # one of several pictures, padded
    first = _POLICIES["pad" if alone else config.image.mode](config, size)
    boxes = _square(config, first)
    placed = np.ones(len(boxes), bool)
    if config.vision.select == "cls_patch":
        boxes, placed = np.vstack((np.zeros((1, 4)), boxes)), np.append(False, placed)
    if config.image.mode == "anyres":
        tiles, kept = _tiles(config, size, layout)
        boxes, placed = np.vstack((boxes, tiles)), np.append(placed, kept)
    return Places(size, boxes, placed)


def grid_for(size: Size, longest: int = 48) -> Size:
    """(w, h) of a map for a picture of this size: its shape, `longest` cells on the longer side."""
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _pad(config: ModelConfig, size: Size) -> tuple[Axis, Axis]:
    side = max(size)
    shown = size
    if side > LONGEST_PADDED:
        shown = (
            max(1, round(size[0] * LONGEST_PADDED / side)),
            max(1, round(size[1] * LONGEST_PADDED / side)),
        )
        side = LONGEST_PADDED
    across, down = (
        Axis(side / config.vision.image_size * n / m, -((side - m) // 2) * n / m)
        for n, m in zip(size, shown, strict=True)
    )
    return across, down


def _crop(config: ModelConfig, size: Size) -> tuple[Axis, Axis]:
    side = config.vision.image_size
    short = min(size)
    long = min(max(size), LONGEST_CROPPED * short)
    axes = []
    for n in size:
        cut = min(n, long)  # pixels of the original that are resized at all
        grown = side if cut == short else side * long // short
        scale = cut / grown
        axes.append(Axis(scale, (n - cut) // 2 + (grown - side) // 2 * scale))
    return axes[0], axes[1]


def _squash(config: ModelConfig, size: Size) -> tuple[Axis, Axis]:
    return Axis(size[0] / config.vision.image_size, 0), Axis(size[1] / config.vision.image_size, 0)


_POLICIES: dict[str, Callable[[ModelConfig, Size], tuple[Axis, Axis]]] = {
    "pad": _pad,
    "crop": _crop,
    "squash": _squash,
    "anyres": _squash,  # its first square
}


def _square(config: ModelConfig, axes: tuple[Axis, Axis]) -> np.ndarray:
    """The boxes of the patches of one square, row by row: (side * side, 4)."""
    side, cell = _tokens(config)
    begin = np.arange(side) * cell
    x, y = (np.stack((axis(begin), axis(begin + cell))) for axis in axes)
    return _boxes(x, y)


def _tokens(config: ModelConfig) -> tuple[int, int]:
    """Tokens on a side of one square, and the pixels of one."""
    factor = 1 if config.connector.reduce == "none" else config.connector.factor
    return config.vision.grid // factor, config.vision.stride * factor


def _tiles(config: ModelConfig, size: Size, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and `placed` of an anyres picture's tokens after those of the first square."""
    target = best_resolution(size, config.image.pinpoints)
    fitted = letterbox(size, target)
    spans = []
    for n, whole, shown, cut, kept, tiles in zip(
        size, target, fitted, (layout.left, layout.top), (layout.width, layout.height),
        (layout.columns, layout.rows), strict=True,
    ):  # fmt: skip
        side, _ = _tokens(config)
        # `kept` tokens share the columns (rows) that were left of the tiles' side * tiles.
        edges = cut + np.arange(kept + 1) * ((side * tiles - 2 * cut) / max(kept, 1))
        begin, end = _pixels(edges[:-1], config, last=False), _pixels(edges[1:], config, last=True)
        axis = Axis(n / shown, -((whole - shown) // 2) * n / shown)
        spans.append(np.stack((axis(begin), axis(end))))
    boxes = _boxes(*spans).reshape(layout.height, layout.width, 4)
    placed = np.ones(boxes.shape[:2], bool)
    if layout.newline:
        boxes = np.concatenate((boxes, np.zeros((layout.height, 1, 4))), 1)
        placed = np.concatenate((placed, np.zeros((layout.height, 1), bool)), 1)
    return boxes.reshape(-1, 4), placed.reshape(-1)


def _pixels(edges: np.ndarray, config: ModelConfig, *, last: bool) -> np.ndarray:
    """Edges counted in tokens along the tiles -> pixels; a tile may have a rest that no token shows."""
    side, cell = _tokens(config)
    tile = np.ceil(edges / side) - 1 if last else np.floor(edges / side)
    return tile * config.vision.image_size + (edges - tile * side) * cell


def _boxes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Beginnings and ends along each side, (2, columns) and (2, rows) -> boxes (rows * columns, 4)."""
    columns, rows = x.shape[1], y.shape[1]
    left, right = (np.tile(edge, rows) for edge in x)
    top, bottom = (np.repeat(edge, columns) for edge in y)
    return np.stack((left, top, right, bottom), 1)


def _covered(begin: np.ndarray, end: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of each interval (N,) that lies in each cell between two of the edges (c + 1): (N, c)."""
    low = np.maximum(begin[:, None], edges[None, :-1])
    high = np.minimum(end[:, None], edges[None, 1:])
    length = (end - begin)[:, None]
    return np.divide(np.maximum(high - low, 0), length, out=np.zeros_like(low), where=length > 0)
