"""The vision transformers of CLIP and SigLIP (arXiv 2103.00020, 2303.15343), up to the chosen hidden state.

SigLIP 2 (arXiv 2502.14786) at a fixed resolution is SigLIP. Hidden states are numbered as in transformers: 0
is the input of the first block, `depth` (or -1) the output of the last one, before the final norm. LLaVA uses
-2. Later blocks and the final norm exist, so that a model can be exported completely, but never run; with
`final_norm` (Idefics3) the features are normalised.

Shapes: B tiles, S pixels on a side, G patches on a side, F features, C width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.config import VisionConfig
from pumice.errors import InputError, check_known
from pumice.kernels.attention import attend_tiles
from pumice.kernels.compute import can_multiply, mlp
from pumice.model.layers import edited, gelu_tanh, sdpa
from pumice.model.quantized import PackedLinear
from pumice.model.transfer import numbers_on


def quick_gelu(x: Tensor) -> Tensor:
    """Compute OpenAI's approximation of GELU, which CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}
# Without gradients on a CPU, tiles are computed together only as far as the largest activations, those of an
# MLP, take so many bytes: more would not stay in the processor's cache.
CACHE_BYTES = 16 << 20
SELECTS = {"clip": ("patch", "cls_patch"), "siglip": ("full",)}  # only CLIP has a class token


@lru_cache(maxsize=1)
def multiplies_tiles() -> bool:
    """Return whether this processor multiplies whole tiles of bfloat16 (AMX), its fastest products."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@lru_cache(maxsize=1)
def multiplies_bf16() -> bool:
    """Return whether this processor has instructions for products of bfloat16: AVX-512 BF16 or AMX."""
    return multiplies_tiles() or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def narrowed(x: Tensor, layer: nn.Module) -> Tensor:
    """Return fp32 activations as bfloat16 where products with the layer's 16-bit weight are twice as fast.

    That is without gradients, on a processor that multiplies bfloat16. Sums are fp32 all the same.
    """
    is_narrower = isinstance(layer, nn.Linear) and layer.weight.dtype != torch.float32
    is_wider = x.device.type == "cpu" and x.dtype == torch.float32 and is_narrower
    return x.bfloat16() if is_wider and not torch.is_grad_enabled() and multiplies_bf16() else x


class WideningLinear(nn.Linear):
    """A linear layer that converts its weights to the dtype of its input.

    So fp16 or bf16 weights take half the memory, and the result is that of fp32 weights.
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
        # Twice as fast as PyTorch's attention (docs/measurements/speed.md), but without gradients.
        if x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and can_multiply(x):
            mixed = attend_tiles(self.q(x).float(), self.k(x).float(), self.v(x).float(), self.heads)
            return self.o(mixed.to(x.dtype))
        q, k, v = (f(x).view(batch, count, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(sdpa(q, k, v).transpose(1, 2).reshape(batch, count, width))


class ViTMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up: nn.Linear | PackedLinear = WideningLinear(config.width, config.mlp_width)
        self.down: nn.Linear | PackedLinear = WideningLinear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        if isinstance(up, PackedLinear) and isinstance(down, PackedLinear) and can_multiply(x):
            # Compiled code runs both products together. A function that was replaced has no name there.
            name = next((name for name, function in ACTIVATIONS.items() if function is self.activation), None)
            if name is not None and edited(up, PackedLinear) is None and edited(down, PackedLinear) is None:
                return mlp(x, up.packed, up.bias, down.packed, down.bias, name)
        return down(self.activation(up(x)))


class ViTBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = ViTAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = ViTMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        # The residual stream stays in fp32; what is added to it may be computed in fewer bits.
        x = x + self.attention(narrowed(self.attention_norm(x), self.attention.q))
        return x + self.mlp(narrowed(self.mlp_norm(x), self.mlp.up))


class ViT(nn.Module):
    """Turns pixels (B, 3, S, S) into features (B, F, C): the class token if selected, then row by row."""

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
        self.position_ids = fractional_positions(config.grid) if config.fractional else None

    def forward(self, pixels: Tensor) -> Tensor:
        tile_bytes = self.config.features * self.config.mlp_width * pixels.element_size()
        count = max(1, CACHE_BYTES // tile_bytes)
        if pixels.device.type == "cpu" and not torch.is_grad_enabled() and len(pixels) > count:
            return torch.cat([self._features(tiles) for tiles in pixels.split(count)])
        return self._features(pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        # Pixels beyond the last complete patch are ignored (384 = 27 * 14 + 6).
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (B, G*G, C)
        if self.has_class_token:
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), 1)
        positions: Tensor = self.positions
        if self.position_ids is not None:
            positions = positions.index_select(0, numbers_on(positions.device, self.position_ids))
        # CLIP normalizes before the first block; for SigLIP this is the identity.
        x = self.pre_norm(x + positions)
        for block in self.blocks[: self.running]:
            x = block(x)
        if self.config.final_norm:
            x = self.post_norm(x)
        return x[:, 1:] if self.config.select == "patch" else x


def fractional_positions(grid: int) -> list[int] | None:
    """Return which position embedding each of grid x grid patches takes; None if each takes its own.

    transformers' Idefics3 sorts the fractional coordinates i / grid into buckets that begin at multiples of
    1 / grid. Rounded to fp32, some fall into the bucket before theirs. Source: Idefics3VisionEmbeddings of
    transformers 5.
    """
    with torch.device("cpu"):
        starts = torch.arange(1 / grid, 1.0, 1 / grid)
        coordinates = torch.arange(grid, dtype=torch.float32) * (1.0 / torch.tensor([grid]))
        buckets = torch.bucketize(coordinates.clamp(max=1.0 - 1e-6), starts, right=True).tolist()
    if buckets == list(range(grid)):
        return None
    return [row * grid + column for row in buckets for column in buckets]


def resize_positions(positions: Tensor, old_grid: int, new_grid: int, class_token: bool) -> Tensor:
    """Resize position embeddings (old_grid**2 [+ 1], C) to new_grid x new_grid patches, bicubic.

    The class token's embedding comes first and stays unchanged.
    """
    if old_grid == new_grid:
        return positions
    class_position, patches = positions[: int(class_token)], positions[int(class_token) :]
    planes = patches.float().T.reshape(1, -1, old_grid, old_grid)
    resized = F.interpolate(planes, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat((class_position, resized[0].flatten(1).T.to(positions.dtype)))


def _blocks_to_run(config: VisionConfig) -> int:
    """Count the blocks before the chosen hidden state. Raise InputError if the config describes no ViT."""
    features = f"a {config.kind} tower cannot select {config.select!r} features"
    check_known(config.select, SELECTS[config.kind], features)
    check_known(config.activation, ACTIVATIONS, f"the tower's activation {config.activation!r} is unknown")
    if config.heads < 1 or config.width % config.heads:
        raise InputError(f"the tower's width {config.width} cannot be shared by {config.heads} heads evenly")
    # The states are the input of the first block and the output of each block.
    states = config.depth + 1
    if not -states <= config.layer < states:
        raise InputError(
            f"the tower has hidden states {-states} to {config.depth}, the config's layer is {config.layer}"
        )
    return config.layer % states


def _parameter(*shape: int) -> nn.Parameter:
    values = torch.empty(*shape)
    if not values.is_meta:  # on meta, this would do nothing but import torch's compiler
        nn.init.normal_(values, std=0.02)
    return nn.Parameter(values)
