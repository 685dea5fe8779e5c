"""Where the parts of a picture stand: its tiles, and the image tokens that are left of them.

Knows sizes, an image policy and whole numbers. Does not know pixels or tensors; standard library only.
The rounding is that of haotian-liu/LLaVA (llava/mm_utils.py and llava_arch.py, v1.6), in floats as there:
a count that differs by one would shift every image token after it.

A "square" is what the vision tower takes, S pixels on a side; the first square of a picture shows all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pumice.config import ModelConfig

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Layout:
    """How the image tokens of one picture follow from its squares.

    First the `base` tokens of the whole picture. Then the tiles (columns x rows of them) as one map of
    tokens: without `top` rows at either end and `left` columns at either side, which show padding, shrunk
    to height x width where it is larger, each row ended by the newline token if there is one. One of
    several pictures, without tiles, has one row that is empty but for the newline.
    """

    base: int
    columns: int = 0
    rows: int = 0
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0
    newline: bool = False

    @property
    def tiles(self) -> int:
        """The number of squares that the tower looks at."""
        return 1 + self.columns * self.rows

    @property
    def tokens(self) -> int:
        """The number of image tokens."""
        return self.base + self.height * (self.width + self.newline)


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The resolution that keeps most of the picture's pixels, then wastes least; the first of equals."""
    width, height = size

    def merit(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - candidate[0] * candidate[1]

    return max(pinpoints, key=merit)


def letterbox(size: Size, target: Size) -> Size:
    """The largest size of the picture's shape inside the target, rounded up."""
    across, down = target[0] / size[0], target[1] / size[1]
    if across < down:
        return target[0], min(math.ceil(size[1] * across), target[1])
    return min(math.ceil(size[0] * down), target[0]), target[1]


def single_tile_layout(config: ModelConfig) -> Layout:
    """The layout of any picture that becomes one square.

    Under anyres the newline token follows it, as in LLaVA-VL/LLaVA-NeXT's llava_arch.py ("single image
    operations") and in transformers' LlavaOnevision.
    """
    return Layout(config.image_tokens, height=int(config.has_newline), newline=config.has_newline)


def picture_layout(config: ModelConfig, size: Size, pictures: int = 1) -> Layout:
    """The layout of a picture of this size, one of so many of a conversation."""
    return tile_layout(config, size) if config.image.tiles(pictures) else single_tile_layout(config)


def tile_layout(config: ModelConfig, size: Size) -> Layout:
    """The layout of a picture of this size that is cut into tiles."""
    policy, base = config.image, config.image_tokens
    side = math.isqrt(base)  # tokens on a side of one square
    target = best_resolution(size, policy.pinpoints)
    columns, rows = (n // config.vision.image_size for n in target)
    width, height = columns * side, rows * side
    top = left = 0
    if policy.unpad:
        if size[0] / size[1] > width / height:
            top = (height - int(size[1] * (width / size[0]))) // 2
        else:
            left = (width - int(size[0] * (height / size[1]))) // 2
        width, height = width - 2 * left, height - 2 * top
    if policy.max_tiles is not None:  # arXiv 2408.03326, section 3.2
        excess = math.sqrt(height * width / (policy.max_tiles * side**2))
        if excess > 1.1:
            width, height = int(width // excess), int(height // excess)
    return Layout(base, columns, rows, top, left, height, width, newline=policy.unpad)
