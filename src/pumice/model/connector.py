"""The connector: a tower's features become image tokens of the decoder's width.

Knows tensors only. One table of kinds; a new one is one function and one row.

Shapes: B squares, G grid side, C tower width, N image tokens of a square, D decoder width.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.config import ConnectorConfig
from pumice.errors import InputError
from pumice.geometry import Layout


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """(B, G*G, C) -> (B, (G/factor)^2, C * factor^2): a square of features becomes one wide one."""
    batch, count, width = features.shape
    grid = int(count**0.5)
    side = grid // factor
    squares = features.view(batch, side, factor, side, factor, width).transpose(2, 3)
    return squares.reshape(batch, side * side, factor * factor * width)


def average(features: Tensor, factor: int) -> Tensor:
    """(B, G*G, C) -> (B, (G/factor)^2, C): the mean of each square."""
    batch, count, width = features.shape
    grid = int(count**0.5)
    pooled = F.avg_pool2d(features.transpose(1, 2).view(batch, width, grid, grid), factor)
    return pooled.flatten(2).transpose(1, 2)


REDUCE = {
    "none": lambda features, factor: features,
    "average": average,
    "pixel_shuffle": pixel_shuffle,
}
WIDENS = {"none": False, "average": False, "pixel_shuffle": True}


def arrange(tokens: Tensor, layout: Layout, newline: Tensor | None) -> Tensor:
    """Tokens (layout.tiles, N, D) of one picture's squares -> its image tokens (layout.tokens, D).

    newline: (D,), where the layout has one. As haotian-liu/LLaVA's `spatial_unpad` (llava_arch.py, v1.6).
    """
    if layout.tiles == 1:
        return tokens[0] if newline is None else torch.cat((tokens[0], newline.to(tokens)[None]))
    count, width = tokens.shape[1:]
    side = int(count**0.5)
    tiles = tokens[1:].view(layout.rows, layout.columns, side, side, width).transpose(1, 2)
    whole = tiles.reshape(layout.rows * side, layout.columns * side, width)
    kept = whole[layout.top : len(whole) - layout.top, layout.left : whole.shape[1] - layout.left]
    if kept.shape[:2] != (layout.height, layout.width):
        planes = kept.permute(2, 0, 1)[None]
        shrunk = F.interpolate(planes, (layout.height, layout.width), mode="bilinear")
        kept = shrunk[0].permute(1, 2, 0)
    if newline is not None:
        kept = torch.cat((kept, newline.to(kept).expand(layout.height, 1, width)), 1)
    return torch.cat((tokens[0], kept.flatten(0, 1)))


def _mlp(depth: int, source: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(source, width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


class Connector(nn.Module):
    """LLaVA's `linear` (v1.0) and `mlpNx_gelu` (v1.5), after an optional reduction of the tokens."""

    def __init__(self, config: ConnectorConfig, source: int, width: int) -> None:
        super().__init__()
        if config.reduce not in REDUCE:
            raise InputError(f"unknown reduction {config.reduce!r}; use one of {', '.join(REDUCE)}")
        self.config = config
        self.reduce = REDUCE[config.reduce]
        source *= config.factor**2 if WIDENS[config.reduce] else 1
        if config.kind == "identity":
            if source != width:
                raise InputError(f"identity connector: the tower gives width {source}, the LLM has {width}")
            self.layers = nn.Sequential()
        elif config.kind == "linear":
            self.layers = _mlp(1, source, width)
        elif match := re.fullmatch(r"mlp([1-9])x_gelu", config.kind):
            self.layers = _mlp(int(match[1]), source, width)
        else:
            raise InputError(f"unknown connector {config.kind!r}; use linear, mlpNx_gelu or identity")

    def forward(self, features: Tensor) -> Tensor:
        """(B, G*G, C) -> (B, N, D)."""
        return self.layers(self.reduce(features, self.config.factor))
