"""The connector turns the vision tower's features into image tokens of the decoder's width.

Shapes: B tiles, G patches on a side, C tower width, N image tokens of a tile, D decoder width.
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
    """Join each factor x factor block of features: (B, G*G, C) -> (B, (G/factor)^2, C * factor^2)."""
    batch, count, width = features.shape
    grid = int(count**0.5)
    side = grid // factor
    blocks = features.view(batch, side, factor, side, factor, width).transpose(2, 3)
    return blocks.reshape(batch, side * side, factor * factor * width)


def average(features: Tensor, factor: int) -> Tensor:
    """Average each factor x factor block of features: (B, G*G, C) -> (B, (G/factor)^2, C)."""
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
    """Arrange the tokens (layout.tiles, N, D) of one image's tiles as its image tokens (layout.tokens, D).

    newline: (D,), added at the end of each row, or None. Source: `spatial_unpad` of haotian-liu/LLaVA
    (llava_arch.py, v1.6).
    """
    if layout.tiles == 1:
        return tokens[0] if newline is None else torch.cat((tokens[0], newline.to(tokens)[None]))
    count, width = tokens.shape[1:]
    side = int(count**0.5)
    # 1. Put the tiles side by side: one map of tokens (rows, columns, D). The first tile shows the whole
    #    image.
    tiles = tokens[1:].view(layout.rows, layout.columns, side, side, width).transpose(1, 2)
    token_map = tiles.reshape(layout.rows * side, layout.columns * side, width)
    # 2. Cut off the tokens that show only padding.
    rows, columns = token_map.shape[:2]
    token_map = token_map[layout.top : rows - layout.top, layout.left : columns - layout.left]
    # 3. Shrink the map if it has more tokens than the layout allows.
    if token_map.shape[:2] != (layout.height, layout.width):
        channels_first = token_map.permute(2, 0, 1)[None]
        resized = F.interpolate(channels_first, (layout.height, layout.width), mode="bilinear")
        token_map = resized[0].permute(1, 2, 0)
    # 4. End each row with the newline token, which tells the decoder the shape of the map.
    if newline is not None:
        token_map = torch.cat((token_map, newline.to(token_map).expand(layout.height, 1, width)), 1)
    return torch.cat((tokens[0], token_map.flatten(0, 1)))


def _mlp(depth: int, in_width: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(in_width, width)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


class Connector(nn.Module):
    """LLaVA's `linear` (v1.0) or `mlpNx_gelu` (v1.5), after an optional reduction of the number of tokens.

    in_width: of the tower's features. width: of the decoder.
    """

    def __init__(self, config: ConnectorConfig, in_width: int, width: int) -> None:
        super().__init__()
        if config.reduce not in REDUCE:
            raise InputError(f"unknown reduction {config.reduce!r}; use one of {', '.join(REDUCE)}")
        self.config = config
        self.reduce = REDUCE[config.reduce]
        in_width *= config.factor**2 if WIDENS[config.reduce] else 1
        if config.kind == "identity":
            if in_width != width:
                raise InputError(f"identity connector: the tower gives width {in_width}, the LLM has {width}")
            self.layers = nn.Sequential()
        elif config.kind == "linear":
            self.layers = _mlp(1, in_width, width)
        elif match := re.fullmatch(r"mlp([1-9])x_gelu", config.kind):
            self.layers = _mlp(int(match[1]), in_width, width)
        else:
            raise InputError(f"unknown connector {config.kind!r}; use linear, mlpNx_gelu or identity")

    def forward(self, features: Tensor) -> Tensor:
        """Turn features (B, G*G, C) into image tokens (B, N, D)."""
        return self.layers(self.reduce(features, self.config.factor))
