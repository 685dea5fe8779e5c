"""The geometry of an image: how it is cut into tiles, and how many image tokens they become.

A tile is the square of pixels that the vision tower takes. The first tile shows the whole image; under
anyres (LLaVA-NeXT) and grid (nanoVLM) more tiles show its parts. Under split (Idefics3) it comes last.

A `Placement` says where the image lies on what the model is shown, for boxes and for maps of tokens.

The rounding is that of haotian-liu/LLaVA (llava/mm_utils.py and llava_arch.py, v1.6), in floats as there: a
count that differs by one would shift every image token after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pumice.config import ImagePolicy, ModelConfig

Size = tuple[int, int]  # width, height

LONGEST_PADDED = 4096  # pixels; a longer picture is shortened before it is padded to a square
LONGEST_CROPPED = 16  # times the short side; beyond it the ends are cut off before resizing


@dataclass(frozen=True)
class Layout:
    """How the tiles of one image become its image tokens.

    The `base` tokens of the first tile, which shows the whole image, come first. The other tiles (columns x
    rows of them) are joined to one map of tokens. The map loses `top` rows at each end and `left` columns at
    each side, which show padding, and is shrunk to height x width if it is larger. Each row of the map ends
    with the newline token if `newline` is set. An image without further tiles may have a map of one row that
    holds nothing but the newline. pool: tokens on a side to which a video's frame is reduced
    (LLaVA-OneVision), or 0. average: features on a side of which a frame's token is made before the connector
    (LLaVA-NeXT-Video), or 0.
    """

    base: int
    columns: int = 0
    rows: int = 0
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0
    newline: bool = False
    pool: int = 0
    average: int = 0

    @property
    def tiles(self) -> int:
        """The number of tiles that the tower encodes."""
        return 1 + self.columns * self.rows

    @property
    def tokens(self) -> int:
        """The number of image tokens."""
        return self.base + self.height * (self.width + self.newline)


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Return the pinpoint that keeps most of the image's pixels, then wastes least; the first of equals."""
    width, height = size

    def score(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        # Enlarging adds no information: an image never counts for more pixels than it has.
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - candidate[0] * candidate[1]

    return max(pinpoints, key=score)


def letterbox(size: Size, target: Size) -> Size:
    """Return the largest size with the image's aspect ratio that fits the target, rounded up."""
    scale_x, scale_y = target[0] / size[0], target[1] / size[1]
    if scale_x < scale_y:
        return target[0], min(math.ceil(size[1] * scale_x), target[1])
    return min(math.ceil(size[0] * scale_y), target[0]), target[1]


LONGEST_SPLIT = 4096  # pixels; the longest side that Idefics3's image processor makes


def split_sizes(size: Size, longest_edge: int, side: int) -> tuple[Size, Size]:
    """Return the sizes to which Idefics3 resizes an image: first the longer side, then whole tiles.

    side: of a tile, in pixels. Source: transformers, Idefics3ImageProcessor.
    """
    width, height = size
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > LONGEST_SPLIT:
        width, height = LONGEST_SPLIT, int(LONGEST_SPLIT / aspect)
    elif height > width and height > LONGEST_SPLIT:
        width, height = int(LONGEST_SPLIT * aspect), LONGEST_SPLIT
    first = (max(width, 1), max(height, 1))
    aspect = first[0] / first[1]
    # The tiles' shorter side follows from the longer one as it is after rounding up.
    if first[0] >= first[1]:
        width = math.ceil(first[0] / side) * side
        height = math.ceil(int(width / aspect) / side) * side
    else:
        height = math.ceil(first[1] / side) * side
        width = math.ceil(int(height * aspect) / side) * side
    return first, (max(width, side), max(height, side))


def grid_size(size: Size, longest_edge: int, side: int, enlarge: bool) -> Size:
    """Return the whole tiles to which nanoVLM resizes an image. enlarge: smaller images grow, too.

    Source: huggingface/nanoVLM, data/custom_transforms.py.
    """
    long, short = max(size), min(size)
    target = longest_edge if enlarge else min(longest_edge, math.ceil(long / side) * side)
    other = max(math.ceil(short * (target / long) / side) * side, side)
    return (target, other) if size[0] >= size[1] else (other, target)


def tile_grid(config: ModelConfig, size: Size) -> Size:
    """Return the (columns, rows) of tiles of an image of this size in the modes split and grid."""
    policy, side = config.image, config.vision.image_size
    if policy.mode == "split":
        _, (width, height) = split_sizes(size, policy.longest_edge, side)
    else:
        width, height = grid_size(size, policy.longest_edge, side, policy.enlarge)
    return width // side, height // side


@dataclass(frozen=True)
class Axis:
    """Converts pixels of a canvas to pixels of the original image along one axis: pixel * scale + start.

    A pixel may be a number or an array of them.
    """

    scale: float
    start: float

    def __call__(self, pixel: Any) -> Any:
        return pixel * self.scale + self.start

    def inverse(self, pixel: Any) -> Any:
        """Convert pixels of the image to pixels of the canvas."""
        return (pixel - self.start) / self.scale


@dataclass(frozen=True)
class Placement:
    """Where an image lies on a canvas: one tile, or all tiles beside each other.

    canvas: its (width, height) in pixels. across, down: the conversion along each axis.
    """

    canvas: Size
    across: Axis
    down: Axis


def first_tile_placement(policy: ImagePolicy, side: int, size: Size, *, tiled: bool = False) -> Placement:
    """Return where an image lies on the tile that shows the whole of it, as `images.pixels` makes it.

    side: of the tile in pixels. tiled: the image's parts are shown as well (anyres, split, grid).
    """
    if tiled or policy.mode in ("squash", "split", "grid"):
        axes = _squashed(size, (side, side))
    else:
        axes = _cropped(size, side) if policy.mode == "crop" else _padded(size, side)
    return Placement((side, side), *axes)


def placement(config: ModelConfig, size: Size, images: int = 1) -> Placement:
    """Return where an image lies on all of its tiles beside each other, or on its only one.

    images: how many images its conversation has.
    """
    policy, side = config.image, config.vision.image_size
    if not policy.uses_tiles(images):
        return first_tile_placement(policy, side, size)
    if policy.mode != "anyres":
        columns, rows = tile_grid(config, size)
        canvas = columns * side, rows * side
        return Placement(canvas, *_squashed(size, canvas))
    canvas = best_resolution(size, policy.pinpoints)
    return Placement(canvas, *_letterboxed(size, canvas))


def shortened(size: Size) -> Size:
    """Return the size that an image has before it is padded to a square: its own, up to LONGEST_PADDED."""
    side = max(size)
    if side <= LONGEST_PADDED:
        return size
    return max(1, round(size[0] * LONGEST_PADDED / side)), max(1, round(size[1] * LONGEST_PADDED / side))


def _padded(size: Size, tile: int) -> tuple[Axis, Axis]:
    scaled = shortened(size)
    side = max(scaled)
    across, down = (
        Axis(side / tile * n / m, -((side - m) // 2) * n / m) for n, m in zip(size, scaled, strict=True)
    )
    return across, down


def _cropped(size: Size, tile: int) -> tuple[Axis, Axis]:
    short = min(size)
    long = min(max(size), LONGEST_CROPPED * short)
    axes = []
    for n in size:
        cut = min(n, long)  # pixels of the original that are resized
        resized = tile if cut == short else tile * long // short
        scale = cut / resized
        axes.append(Axis(scale, (n - cut) // 2 + (resized - tile) // 2 * scale))
    return axes[0], axes[1]


def _squashed(size: Size, canvas: Size) -> tuple[Axis, Axis]:
    return Axis(size[0] / canvas[0], 0), Axis(size[1] / canvas[1], 0)


def _letterboxed(size: Size, canvas: Size) -> tuple[Axis, Axis]:
    across, down = (
        Axis(n / content, -((whole - content) // 2) * n / content)
        for n, whole, content in zip(size, canvas, letterbox(size, canvas), strict=True)
    )
    return across, down


def single_tile_layout(config: ModelConfig) -> Layout:
    """Return the layout of an image that becomes one tile, whatever its size.

    Under anyres the newline token follows the tile, as in LLaVA-VL/LLaVA-NeXT's llava_arch.py ("single image
    operations") and in transformers' LlavaOnevision.
    """
    return Layout(config.image_tokens, height=int(config.has_newline), newline=config.has_newline)


def frame_layout(config: ModelConfig, last: bool) -> Layout:
    """Return the layout of a video's frame. last: the newline follows the whole video (LLaVA-OneVision)."""
    factor = 1 if config.video is None else config.video.pool
    if config.video is not None and config.video.average:
        return Layout((math.isqrt(config.image_tokens) // factor) ** 2, average=factor)
    newline = config.has_newline and last
    side = math.ceil(math.isqrt(config.image_tokens) / factor) if factor > 1 else 0
    return Layout(side**2 or config.image_tokens, height=int(newline), newline=newline, pool=side)


def image_layout(config: ModelConfig, size: Size, images: int = 1) -> Layout:
    """Return the layout of an image of this size. images: how many images its conversation has."""
    return tile_layout(config, size) if config.image.uses_tiles(images) else single_tile_layout(config)


def tile_layout(config: ModelConfig, size: Size) -> Layout:
    """Return the layout of an image of this size that is cut into tiles."""
    policy, base = config.image, config.image_tokens
    side = math.isqrt(base)  # tokens on a side of one tile
    if policy.mode != "anyres":
        columns, rows = tile_grid(config, size)
        if columns * rows == 1:  # the whole image is that tile
            return single_tile_layout(config)
        return Layout(base, columns, rows, height=rows * side, width=columns * side)
    # 1. Choose the resolution, and with it the grid of tiles and the size of their map of tokens.
    target = best_resolution(size, policy.pinpoints)
    columns, rows = (n // config.vision.image_size for n in target)
    width, height = columns * side, rows * side
    # 2. Remove the rows or columns that show only padding. LLaVA compares aspect ratios in tokens.
    top = left = 0
    if policy.unpad:
        if size[0] / size[1] > width / height:
            top = (height - int(size[1] * (width / size[0]))) // 2
        else:
            left = (width - int(size[0] * (height / size[1]))) // 2
        width, height = width - 2 * left, height - 2 * top
    # 3. Shrink a map of more tokens than `max_tiles` have (LLaVA-OneVision, arXiv 2408.03326, section 3.2).
    if policy.max_tiles is not None:
        ratio = math.sqrt(height * width / (policy.max_tiles * side**2))
        if ratio > 1.1:  # LLaVA leaves a map alone that is hardly too large
            width, height = int(width // ratio), int(height // ratio)
    return Layout(base, columns, rows, top, left, height, width, newline=policy.unpad)
