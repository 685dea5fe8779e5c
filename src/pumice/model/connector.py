"""The connector turns the vision tower's features into image tokens of the decoder's width.

Shapes: B tiles, G patches on a side, C tower width, N image tokens of a tile, D decoder width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.capability import Capability, fields
from pumice.config import ConnectorConfig, ModelConfig
from pumice.errors import InputError, check_known
from pumice.geometry import Layout
from pumice.model.trial import try_shapes


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


@dataclass(frozen=True)
class Reduction:
    """A way to reduce the features of a tile. Their number after it is in `config.REDUCTIONS`.

    apply: features (B, G*G, C) and the factor -> (B, N, C * factor ** 2 if `widens` else C).
    """

    apply: Callable[[Tensor, int], Tensor]
    widens: bool


REDUCE = {
    "none": Reduction(lambda features, factor: features, widens=False),
    "average": Reduction(average, widens=False),
    "pixel_shuffle": Reduction(pixel_shuffle, widens=True),
}


def _reduction(name: str) -> Reduction:
    check_known(name, REDUCE, f"unknown reduction {name!r}")
    return REDUCE[name]


def arrange(tokens: Tensor, layout: Layout, newline: Tensor | None) -> Tensor:
    """Arrange the tokens (layout.tiles, N, D) of one image's tiles as its image tokens (layout.tokens, D).

    newline: (D,), added at the end of each row, or None. Source: `spatial_unpad` of haotian-liu/LLaVA
    (llava_arch.py, v1.6).
    """
    if layout.pool:  # a frame of a video: LLaVA-OneVision, arXiv 2408.03326, section 3.2
        side = int(tokens.shape[1] ** 0.5)
        planes = tokens.transpose(1, 2).unflatten(2, (side, side))
        tokens = F.interpolate(planes, (layout.pool, layout.pool), mode="bilinear").flatten(2).transpose(1, 2)
    if layout.tiles == 1:
        ends = newline is not None and layout.newline
        return torch.cat((tokens[0], newline.to(tokens)[None])) if newline is not None and ends else tokens[0]
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


def _mlp(depth: int, in_width: int, width: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(in_width, width, bias)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width, width, bias)]
    return nn.Sequential(*layers)


def _identity(in_width: int, width: int) -> nn.Sequential:
    if in_width != width:
        raise InputError(f"identity connector: the tower gives width {in_width}, the LLM has {width}")
    return nn.Sequential()


# The kinds of connectors: from the width of reduced features and the decoder's width to the layers.
KINDS: dict[str, Callable[..., nn.Sequential]] = {
    "identity": _identity,
    "linear": partial(_mlp, 1),  # LLaVA 1.0's
    **{f"mlp{depth}x_gelu": partial(_mlp, depth) for depth in range(1, 10)},  # LLaVA 1.5's has two layers
}
_BUILT_IN = dict(KINDS)  # known to keep the number of tokens
CAPABILITY = Capability("the connector", {ConnectorConfig: fields("kind reduce factor bias")})


class Connector(nn.Module):
    """The layers of one of KINDS, after an optional reduction of the number of tokens.

    in_width: of the tower's features. width: of the decoder.
    """

    def __init__(self, config: ConnectorConfig, in_width: int, width: int) -> None:
        super().__init__()
        CAPABILITY.check(config)
        check_known(config.kind, KINDS, f"unknown connector {config.kind!r}")
        self.config = config
        self.reduce = _reduction(config.reduce)
        # Every kind takes two widths; `bias` is asked only where it is set.
        options = {} if config.bias else {"bias": False}
        in_width *= config.factor**2 if self.reduce.widens else 1
        try:
            inspect.signature(KINDS[config.kind]).bind(in_width, width, **options)
        except TypeError as error:
            what = "takes no widths" if config.bias else "does not implement bias = False"
            raise InputError(f"a connector of kind {config.kind!r} {what} ({error})") from error
        self.layers = KINDS[config.kind](in_width, width, **options)

    def forward(self, features: Tensor) -> Tensor:
        """Turn features (B, G*G, C) into image tokens (B, N, D)."""
        return self.layers(self.reduce.apply(features, self.config.factor))


def check_image_tokens(config: ModelConfig) -> None:
    """Raise InputError unless the connector gives as many tokens of a tile as the config counts.

    One trial of the shapes, without values. `arrange` joins tiles, and shrinks frames of videos, as squares
    of tokens: theirs must be a square.
    """
    if config.vision.kind == "none":
        return
    # 1. The reduction. One channel on the CPU is enough to count, and costs nothing.
    features = torch.zeros(1, config.vision.features, 1, device="cpu")
    kind, reduce, factor = config.connector.kind, config.connector.reduce, config.connector.factor
    tokens = _reduction(reduce).apply(features, factor).shape[1]
    if tokens != config.image_tokens:
        raise InputError(
            f"the connector gives {tokens} image tokens of a tile, config.REDUCTIONS counts "
            f"{config.image_tokens} for {reduce!r}; correct the count"
        )
    # 2. The layers of a user's own kind.
    vision, width = config.vision, config.decoder.width
    if kind not in _BUILT_IN or KINDS.get(kind) is not _BUILT_IN[kind]:
        try_shapes(
            f"a connector of kind {kind!r}, whose layers may not change the number of tokens,",
            lambda: Connector(config.connector, vision.width, width),
            (1, vision.features, vision.width),
            ("tokens", tokens, width),
            "the LLM has",
        )
    # 3. What is joined later.
    as_squares = config.image.mode == "anyres" or (config.video is not None and config.video.pool > 1)
    if as_squares and math.isqrt(tokens) ** 2 != tokens:
        raise InputError(
            f"tiles and frames are joined as squares of tokens, but {reduce!r} gives {tokens} of a tile; use "
            "another reduction, or an image mode without tiles"
        )
