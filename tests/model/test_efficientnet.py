"""EfficientNet-Lite: its published sizes, TensorFlow's padding, and frozen batch statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pumice.config import VisionConfig
from pumice.errors import InputError
from pumice.model.efficientnet import ConvNorm, EfficientNetLite, MBConv

# Blocks per stage and channels after each stage: the tables that the multipliers of
# tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py lead to, as printed in
# RangiLyu/EfficientNet-Lite and timm. Millions of parameters with the 1000 classes: timm's results table.
PUBLISHED = {
    "lite0": ([1, 2, 2, 3, 3, 4, 1], [16, 24, 40, 80, 112, 192, 320], 4.65),
    "lite1": ([1, 3, 3, 4, 4, 5, 1], [16, 24, 40, 80, 112, 192, 320], 5.42),
    "lite2": ([1, 3, 3, 4, 4, 5, 1], [16, 24, 48, 88, 120, 208, 352], 6.09),
    "lite3": ([1, 3, 3, 5, 5, 6, 1], [24, 32, 48, 96, 136, 232, 384], 8.20),
    "lite4": ([1, 4, 4, 6, 6, 8, 1], [24, 32, 56, 112, 160, 272, 448], 13.01),
}
KERNELS = [3, 3, 5, 3, 5, 5, 3]
STRIDES = [1, 2, 2, 2, 1, 2, 1]


def tower(variant: str = "lite0") -> EfficientNetLite:
    return EfficientNetLite(VisionConfig(variant=variant))


@pytest.mark.parametrize("variant", PUBLISHED)
def test_depths_channels_and_parameters_are_the_published_ones(variant: str) -> None:
    depths, channels, millions = PUBLISHED[variant]
    with torch.device("meta"):
        model = tower(variant)
    expected = [(c, k) for c, k, n in zip(channels, KERNELS, depths, strict=True) for _ in range(n)]
    blocks = [block for block in model.blocks if isinstance(block, MBConv)]
    assert [(b.project.conv.out_channels, b.depthwise.conv.kernel_size[0]) for b in blocks] == expected
    strides = [s if i == 0 else 1 for s, n in zip(STRIDES, depths, strict=True) for i in range(n)]
    assert [b.depthwise.conv.stride[0] for b in blocks] == strides
    assert model.stem.conv.out_channels == 32
    classes = 1280 * 1000 + 1000
    assert round((sum(p.numel() for p in model.parameters()) + classes) / 1e6, 2) == millions


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
@torch.no_grad()
def test_features_are_one_per_32_pixels_row_by_row(variant: str) -> None:
    torch.manual_seed(0)
    model = tower(variant).eval()
    assert model(torch.rand(2, 3, 96, 96)).shape == (2, 9, 1280)
    flat = torch.zeros(1, 3, 320, 320)
    for row, column in ((0, 9), (9, 0), (3, 6)):  # a spot changes the features around its own square the most
        spot = flat.clone()
        spot[..., 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 3
        change = (model(spot) - model(flat)).abs().sum(-1)[0]
        position = divmod(int(change.argmax()), 10)
        assert abs(position[0] - row) <= 1
        assert abs(position[1] - column) <= 1


def same(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """TensorFlow's "SAME" convolution of one channel, written from its documentation, pixel by pixel."""
    size, side = len(x), len(kernel)
    outputs = -(-size // stride)
    missing = side - stride if size % stride == 0 else side - size % stride
    before = max(missing, 0) // 2
    result = np.zeros((outputs, outputs))
    for row in range(outputs):
        for column in range(outputs):
            for i in range(side):
                for j in range(side):
                    y, z = row * stride + i - before, column * stride + j - before
                    if 0 <= y < size and 0 <= z < size:
                        result[row, column] += x[y, z] * kernel[i, j]
    return result


@settings(max_examples=30)
@given(size=st.integers(1, 9), kernel=st.sampled_from([1, 3, 5]), stride=st.sampled_from([1, 2]))
def test_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int) -> None:
    torch.manual_seed(size)
    layer = ConvNorm(1, 1, kernel, stride, act=False).double().eval()
    x = torch.randn(1, 1, size, size, dtype=torch.float64)
    with torch.no_grad():
        actual = layer(x)[0, 0].numpy() * math.sqrt(1 + 1e-3)  # the fresh norm divides by this
    expected = same(x[0, 0].numpy(), layer.conv.weight[0, 0].detach().numpy(), stride)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_height_and_width_are_padded_each_by_its_own_size() -> None:
    layer = ConvNorm(1, 1, 3, 2, act=False).eval()
    assert layer(torch.zeros(1, 1, 7, 10)).shape == (1, 1, 4, 5)
    x = torch.randn(1, 1, 7, 10)
    padded = F.conv2d(F.pad(x, (0, 1, 1, 1)), layer.conv.weight, stride=2)
    torch.testing.assert_close(layer(x), layer.norm(padded))


def test_shortcut_where_shape_and_stride_allow() -> None:
    torch.manual_seed(0)
    block = MBConv(8, 8, 3, 1, 6).eval()
    nn.init.zeros_(block.project.conv.weight)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x)
    assert not MBConv(8, 8, 3, 2, 6).shortcut
    assert not MBConv(8, 16, 3, 1, 6).shortcut


def test_activations_are_clipped_at_six_but_projections_are_not() -> None:
    x = torch.full((1, 1, 1, 1), 100.0)
    layer = ConvNorm(1, 1, 1).eval()
    nn.init.ones_(layer.conv.weight)
    assert layer(x).item() == 6
    layer.act = False
    assert layer(x).item() == pytest.approx(100 / math.sqrt(1.001))


def test_batch_statistics_stay_when_the_model_around_trains() -> None:
    around = nn.ModuleDict({"tower": tower(), "other": nn.Dropout()})
    around.train()
    assert around["other"].training
    assert not any(module.training for module in around["tower"].modules())
    before = {name: value.clone() for name, value in around["tower"].named_buffers()}
    first = around["tower"](torch.rand(3, 3, 64, 64) * 5)
    assert all(torch.equal(value, before[name]) for name, value in around["tower"].named_buffers())
    first.sum().backward()
    assert around["tower"].stem.conv.weight.grad.abs().sum() > 0


def test_wrong_variants_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="unknown EfficientNet-Lite 'lite5'; use one of lite0, lite1"):
        tower("lite5")
    with pytest.raises(InputError, match="width 1280 at stride 32, the config says width 768 at stride 16"):
        EfficientNetLite(VisionConfig(width=768, stride=16))


@pytest.mark.parametrize(("fine", "channels"), [(8, 40), (16, 112)])
def test_finer_features_stand_beside_those_of_the_same_pixels(fine: int, channels: int) -> None:
    factor = 32 // fine
    width = 1280 + channels * factor**2
    torch.manual_seed(0)
    joined = EfficientNetLite(
        VisionConfig(variant="lite0", image_size=96, width=width, also_stride=fine)
    ).eval()
    plain = tower("lite0").eval()
    plain.load_state_dict(joined.state_dict())  # no weight of its own
    pixels = torch.randn(2, 3, 96, 96)
    block_outputs: list[torch.Tensor] = []
    with torch.inference_mode():
        for block in joined.blocks:
            block.register_forward_hook(lambda _, __, output: block_outputs.append(output))
        actual = joined(pixels)
        assert torch.equal(actual[..., :1280], plain(pixels))
    assert actual.shape == (2, 9, width)
    maps = [x for x in block_outputs if x.shape[-1] == 96 // fine]
    last = maps[-1]  # the deepest of that stride
    assert last.shape[1] == channels
    beside = actual[..., 1280:].view(2, 3, 3, factor, factor, channels)
    for row, column in ((0, 0), (1, 2)):
        square = last[:, :, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        channels_last = square.permute(0, 2, 3, 1).flatten(1)
        expected = torch.nn.functional.layer_norm(channels_last, channels_last.shape[1:])
        torch.testing.assert_close(beside[:, row, column].flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_finer_features_need_their_width_and_their_tower() -> None:
    with pytest.raises(
        InputError, match="gives width 1760 at stride 32 with also_stride 16, the config says"
    ):
        EfficientNetLite(VisionConfig(also_stride=16))
    with pytest.raises(InputError, match="a siglip tower has features of one stride; leave also_stride out"):
        VisionConfig(kind="siglip", also_stride=16)
    with pytest.raises(InputError, match="also_stride must be 0, 8 or 16, not 4"):
        VisionConfig(also_stride=4)
