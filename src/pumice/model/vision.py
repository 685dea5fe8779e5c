"""CLIP's and SigLIP's vision transformer (arXiv 2103.00020, 2303.15343), up to the chosen hidden state.

Knows tensors and its config. SigLIP 2 (arXiv 2502.14786) at a fixed resolution is SigLIP. Hidden states
are counted as transformers counts them: 0 is what enters the first block, `depth` (or -1) what leaves the
last, before the final norm. LLaVA takes -2. Blocks beyond it and the final norm are kept, so that a model
can be written out whole, but never run.

Shapes: B squares, S pixels on a side, G patches on a side, F features, C width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.config import VisionConfig
from pumice.errors import InputError
from pumice.model.layers import sdpa


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, with which CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}
SELECTS = {"clip": ("patch", "cls_patch"), "siglip": ("full",)}  # only CLIP has a class token


class WideningLinear(nn.Linear):
    """A Linear whose weights may be kept in fewer bits than what comes in: they are widened as they are used.

    fp16 and bf16 weights then take half the memory, and the result is that of weights widened beforehand.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class ViTAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = WideningLinear(config.width, config.width)
        self.k = WideningLinear(config.width, config.width)
        self.v = WideningLinear(config.width, config.width)
        self.o = WideningLinear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = (f(x).view(batch, count, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(sdpa(q, k, v).transpose(1, 2).reshape(batch, count, width))


class ViTMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = WideningLinear(config.width, config.mlp_width)
        self.down = WideningLinear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class ViTBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = ViTAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = ViTMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """pixels (B, 3, S, S) -> features (B, F, C), row by row from the top left, a kept class token first."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.running = _blocks_to_run(config)
        self.has_class_token = config.kind == "clip"
        self.patch = nn.Conv2d(3, config.width, config.stride, config.stride, bias=not self.has_class_token)
        self.positions = _parameter(config.grid**2 + self.has_class_token, config.width)
        self.pre_norm: nn.Module = nn.Identity()
        if self.has_class_token:
            self.class_token = _parameter(config.width)
            self.pre_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.post_norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        # pixels beyond the last whole patch (384 = 27 * 14 + 6) are not seen
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (B, G*G, C)
        if self.has_class_token:
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), 1)
        x = self.pre_norm(x + self.positions)
        for block in self.blocks[: self.running]:
            x = block(x)
        return x[:, 1:] if self.config.select == "patch" else x


def resize_positions(positions: Tensor, old_grid: int, new_grid: int, class_token: bool) -> Tensor:
    """Position embeddings (old_grid**2 [+ 1], C) for a picture of new_grid x new_grid patches, bicubic.

    The class token's, which comes first, stays as it is.
    """
    if old_grid == new_grid:
        return positions
    first, patches = positions[: int(class_token)], positions[int(class_token) :]
    square = patches.float().T.reshape(1, -1, old_grid, old_grid)
    resized = F.interpolate(square, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat((first, resized[0].flatten(1).T.to(positions.dtype)))


def _blocks_to_run(config: VisionConfig) -> int:
    """How many blocks lie before the chosen hidden state; InputError when the config is no ViT."""
    if config.select not in SELECTS[config.kind]:
        known = " or ".join(SELECTS[config.kind])
        raise InputError(f"a {config.kind} tower cannot select {config.select!r} features; use {known}")
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"the tower's activation {config.activation!r} is unknown; use one of {known}")
    if config.heads < 1 or config.width % config.heads:
        raise InputError(f"the tower's width {config.width} cannot be shared by {config.heads} heads evenly")
    states = config.depth + 1
    if not -states <= config.layer < states:
        raise InputError(
            f"the tower has hidden states {-states} to {config.depth}, the config's layer is {config.layer}"
        )
    return config.layer % states


def _parameter(*shape: int) -> nn.Parameter:
    values = torch.empty(*shape)
    if not values.is_meta:  # where drawing nothing would import all of torch's compiler
        nn.init.normal_(values, std=0.02)
    return nn.Parameter(values)
