"""Towers whose MLPs multiply in integers: nearly as exact, and the same in any company."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pumice.config import VisionConfig
from pumice.errors import WorkError
from pumice.kernels import compute, loader
from pumice.model import quantized_vision, vision
from pumice.model.quantized import PackedLinear
from pumice.model.quantized_vision import quantize_vision, quantized_shapes
from pumice.model.vision import ViT

BOUND = 0.06  # of the features' relative change; measured worst: 0.044, and in bf16 alone 0.043

CLIP = VisionConfig("clip", image_size=56, stride=8, width=96, depth=4, heads=4, mlp_width=176)
SIGLIP = replace(CLIP, kind="siglip", select="full", activation="gelu_tanh", layer=-1, final_norm=True)
TOWERS = {
    "clip": CLIP,
    "siglip": SIGLIP,
    # As so400m: neither heads nor the MLP are whole groups.
    "odd": replace(SIGLIP, width=160, heads=8, mlp_width=200, activation="gelu"),
}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this processor for one that multiplies integers and bfloat16 fast, whatever it is."""
    if loader.compiled("packed")[0] is None:
        pytest.skip(loader.compiled("packed")[1])
    monkeypatch.setattr(quantized_vision, "multiplies_fast", lambda: True)
    monkeypatch.setattr(quantized_vision, "multiplies_tiles", lambda: False)
    monkeypatch.setattr(vision, "multiplies_bf16", lambda: True)


def random_tower(kind: str, outlier: float = 1.0) -> ViT:
    """Weights with heavy tails, in 16 bits; `outlier` multiplies some channels of what each block reads."""
    generator = torch.Generator().manual_seed(0)
    tower = ViT(TOWERS[kind]).requires_grad_(False).eval()
    for name, weight in tower.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if name.startswith("blocks") and weight.dim() == 2:
            tails = torch.randn((4, *weight.shape), generator=generator).square().mean(0).sqrt()
            weight.data = (values / tails / weight.shape[1] ** 0.5).half()
        elif name.endswith("norm.weight"):
            weight.copy_(1 + 0.2 * values)
            weight[:3] *= outlier
        elif weight.dim() == 1:
            weight.copy_(0.1 * values)
    return tower


def quantized(tower: ViT) -> ViT:
    tower = copy.deepcopy(tower)
    quantize_vision(tower, tower.get_parameter)
    return tower


def photo(tower: ViT, count: int = 3) -> Tensor:
    side = tower.config.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def change(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("outlier", [1.0, 10.0])
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_features_change_by_little(kind: str, outlier: float) -> None:
    tower = random_tower(kind, outlier)
    few = quantized(tower)
    packed = {f"{name}.weight" for name, layer in few.named_modules() if isinstance(layer, PackedLinear)}
    assert packed == quantized_shapes(tower).keys()
    assert len(packed) == 2 * tower.config.depth
    pixels = photo(tower)
    with torch.enable_grad():  # then nothing is rounded
        exact = tower(pixels)
    rounded, result = change(tower(pixels), exact), change(few(pixels), exact)
    print(f"{kind} {outlier}: bf16 {rounded:.4f}, int8 {result:.4f}")
    assert 0 < rounded < result < BOUND


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_products_are_those_of_the_rounded_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch with the same weights differs by the rounding of activations, also with gradients."""
    few = quantized(random_tower(kind))
    pixels = photo(few)
    result = few(pixels)
    monkeypatch.setattr(compute, "library", lambda: None)
    restored = few(pixels)
    assert 0 < change(result, restored) < BOUND
    monkeypatch.undo()
    block, x = few.blocks[0], torch.randn(1, 9, few.config.width, generator=torch.Generator().manual_seed(2))
    expected = block.mlp.down(block.mlp.activation(block.mlp.up(x)))
    assert torch.allclose(block.mlp(x), expected, atol=1e-3 * expected.abs().max().item())
    with torch.enable_grad():
        gradient = torch.autograd.grad(block.mlp(x.requires_grad_()).sum(), x)[0]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_tile_does_not_depend_on_its_neighbours_or_on_threads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = quantized(random_tower(kind))
    x = torch.randn(3, 50, few.config.width, generator=torch.Generator().manual_seed(1))
    mlp = few.blocks[0].mlp
    together = mlp(x)
    assert torch.equal(together, torch.cat([mlp(tile[None]) for tile in x]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(mlp(x), together)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_attention_in_bfloat16_is_pytorchs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = random_tower(kind).blocks[0].attention
    x = torch.randn(2, 50, TOWERS[kind].width, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.enable_grad():
        exact = attention(x.float())
    calls = []
    compiled = vision.attend_tiles
    monkeypatch.setattr(vision, "attend_tiles", lambda *args: calls.append(args) or compiled(*args))
    result = attention(x)
    assert len(calls) == 1
    monkeypatch.setattr(vision, "can_multiply", lambda x: False)
    pytorchs = change(attention(x).float(), exact)
    assert len(calls) == 1
    # Measured worst: 1.10 of PyTorch's error
    print(f"{kind}: {change(result.float(), exact):.2e}, PyTorch {pytorchs:.2e}")
    assert change(result.float(), exact) < 1.25 * pytorchs < 0.02


@torch.no_grad()
def test_a_tower_without_values_is_counted_and_not_computed() -> None:
    """`pumice plan` runs a GPU's tower in bfloat16 on fake tensors, which compiled code must not read."""
    tower = random_tower("clip")
    blocks = tower.blocks[0], quantized(tower).blocks[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 50, 96, dtype=torch.bfloat16)
        for block in blocks:
            assert block.attention(x).shape == block.mlp(x).shape == x.shape


@torch.no_grad()
def test_an_edited_activation_function_is_kept() -> None:
    mlp = quantized(random_tower("clip")).blocks[0].mlp
    x = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    hook = mlp.up.register_forward_hook(lambda layer, args, y: seen.append(y))
    mlp(x)
    assert torch.equal(seen[0], mlp.up(x))
    hook.remove()
    mlp.activation = torch.relu
    assert torch.equal(mlp(x), mlp.down(torch.relu(mlp.up(x))))


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    tower = random_tower("clip")
    tower.blocks[1].mlp.down.weight[3, 4] = torch.nan
    with pytest.raises(WorkError, match=r"tower\.blocks\.1\.mlp\.down holds .* not finite in row 3"):
        quantized(tower)
