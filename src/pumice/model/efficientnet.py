"""EfficientNet-Lite is the convolutional vision tower of the built-in model.

Source: github.com/tensorflow/tpu, models/official/efficientnet/lite (no squeeze-and-excite, ReLU6, stem and
head of fixed width). Padding is TensorFlow's "SAME".

Shapes: B images, S pixels on a side, G = S / 32, C channels, W width of a feature.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.config import VisionConfig
from pumice.errors import InputError, check_known

# width and depth multipliers of the published variants
VARIANTS = {
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}
# EfficientNet-B0's stages: repeats, kernel, stride, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


def _round_channels(channels: int, multiplier: float) -> int:
    """Return the nearest multiple of 8 that is not more than 10 % too small."""
    exact = channels * multiplier
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


class ConvNorm(nn.Module):
    """Convolution with "SAME" padding, batch norm, and ReLU6 unless it is a projection."""

    def __init__(
        self, source: int, target: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(source, target, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(target, eps=1e-3)
        self.kernel, self.stride, self.act = kernel, stride, act

    def forward(self, x: Tensor) -> Tensor:
        # SAME padding gives ceil(size / stride) outputs. An odd pixel is added on the right and at the
        # bottom.
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
            pads += [total // 2, total - total // 2]
        # Even padding is part of the convolution; only uneven padding needs a copy of x.
        if pads[0] == pads[1] and pads[2] == pads[3]:
            x = F.conv2d(x, self.conv.weight, None, self.stride, (pads[2], pads[0]), 1, self.conv.groups)
        else:
            x = self.conv(F.pad(x, pads))
        x = self.norm(x)
        return F.relu6(x) if self.act else x


class MBConv(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project, and a shortcut if the shape allows it."""

    def __init__(self, source: int, target: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = source * expansion
        self.expand = ConvNorm(source, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = ConvNorm(inner, target, 1, act=False)
        self.shortcut = stride == 1 and source == target

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


def fine_channels(variant: str, stride: int) -> int:
    """Channels of the features of `stride` pixels, as the last block of that stride gives them."""
    channels = {8: 40, 16: 112}[stride]  # EfficientNet-B0's
    return _round_channels(channels, VARIANTS[variant][0])


class EfficientNetLite(nn.Module):
    """Turns pixels (B, 3, S, S) into features (B, G*G, W), row by row from the top left.

    A feature is the head's 1280 channels. With `also_stride` 16 the channels of the 2 x 2 finer features on
    the same pixels follow, row by row (with 8 of the 4 x 4), normalised: they carry smaller things and
    their places.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        check_known(config.variant, VARIANTS, f"unknown EfficientNet-Lite {config.variant!r}")
        fine = config.also_stride
        whole = HEAD + (fine_channels(config.variant, fine) * (32 // fine) ** 2 if fine else 0)
        if (config.width, config.stride) != (whole, 32):
            also = f" with also_stride {fine}" if fine else ""
            raise InputError(
                f"EfficientNet-Lite gives width {whole} at stride 32{also}, "
                f"the config says width {config.width} at stride {config.stride}"
            )
        width, depth = VARIANTS[config.variant]
        self.stem = ConvNorm(3, STEM, 3, 2)
        blocks: list[nn.Module] = []
        source, pixels = STEM, 2
        self.fine = -1  # the last block whose features stand for also_stride pixels
        for number, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            target = _round_channels(channels, width)
            if number not in (0, len(STAGES) - 1):  # Lite does not repeat the first and the last stage
                repeats = math.ceil(repeats * depth)
            for repeat in range(repeats):
                blocks.append(MBConv(source, target, kernel, stride if repeat == 0 else 1, expansion))
                source = target
            pixels *= stride
            if pixels == fine:
                self.fine = len(blocks) - 1
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(source, HEAD, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        fine = None
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == self.fine:
                fine = x
        x = self.head(x)
        if fine is not None:
            factor = fine.shape[-1] // x.shape[-1]
            squares = F.pixel_unshuffle(fine, factor)  # (B, C * factor^2, G, G): channels before places
            fine_features = (
                squares.unflatten(1, (-1, factor**2)).transpose(1, 2).flatten(1, 2)
            )  # (B, W - 1280, G, G)
            features = (x.flatten(2).transpose(1, 2), fine_features.flatten(2).transpose(1, 2))
            # Blocks end without an activation, ten times as far from 0 as the head does.
            return torch.cat((features[0], F.layer_norm(features[1], features[1].shape[-1:])), -1)
        return x.flatten(2).transpose(1, 2)

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Stay in evaluation mode: batch norms keep ImageNet's statistics."""
        return super().train(False)
