"""The ViT against transformers' CLIP and SigLIP, on small random models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from pumice.config import VisionConfig
from pumice.errors import InputError
from pumice.formats.names import clip_tower, convert, siglip_tower
from pumice.model.vision import ViT, resize_positions

CLIP = VisionConfig("clip", image_size=30, stride=6, width=32, depth=3, heads=4, mlp_width=48)
SIGLIP = dataclasses.replace(CLIP, kind="siglip", select="full", activation="gelu_tanh", norm_eps=1e-6)
HF_NAMES = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Measured worst case over all tests: 0, where both reach the same kernels of PyTorch.
CLOSE = 1e-5


def pair(config: VisionConfig, **options: Any) -> tuple[Any, ViT]:
    """A random model of transformers, and ours with its weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name = {"clip": "CLIPVision", "siglip": "SiglipVision"}[config.kind]
    hf_config = getattr(transformers, f"{name}Config")(
        hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, image_size=config.image_size, patch_size=config.stride,
        hidden_act=HF_NAMES[config.activation], layer_norm_eps=config.norm_eps, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = getattr(transformers, f"{name}Model")(hf_config).eval()
        for parameter in reference.parameters():  # fresh biases are zero, fresh norms one: nothing would show
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in reference.state_dict().items()}
    vit = ViT(config).eval()
    table = clip_tower(config) if config.kind == "clip" else siglip_tower(config)
    vit.load_state_dict(convert(state, table))
    return reference, vit


def photo(config: VisionConfig, count: int = 2, side: int | None = None) -> Tensor:
    side = side or config.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", HF_NAMES)
@pytest.mark.parametrize("base", [CLIP, SIGLIP], ids=["clip", "siglip"])
@torch.no_grad()
def test_every_hidden_state_equals_transformers(base: VisionConfig, activation: str) -> None:
    config = dataclasses.replace(base, activation=activation)
    reference, vit = pair(config)
    states = reference(photo(config), output_hidden_states=True).hidden_states
    assert len(states) == config.depth + 1
    for layer in range(-len(states), len(states)):
        layer_config = dataclasses.replace(config, layer=layer)
        tower = ViT(layer_config).eval()
        tower.load_state_dict(vit.state_dict())
        expected = states[layer][:, 1:] if config.kind == "clip" else states[layer]
        actual = tower(photo(config))
        assert actual.shape == (2, layer_config.features, config.width)
        assert (actual - expected).abs().max() < CLOSE


@torch.no_grad()
def test_the_class_token_may_stay() -> None:
    config = dataclasses.replace(CLIP, select="cls_patch")
    reference, vit = pair(config)
    expected = reference(photo(config), output_hidden_states=True).hidden_states[-2]
    actual = vit(photo(config))
    assert actual.shape == (2, 26, 32) == (2, config.features, 32)
    assert (actual - expected).abs().max() < CLOSE


@pytest.mark.parametrize("base", [CLIP, SIGLIP], ids=["clip", "siglip"])
@torch.no_grad()
def test_pixels_beyond_the_last_patch_are_not_seen(base: VisionConfig) -> None:
    config = dataclasses.replace(base, image_size=34)  # as SigLIP's 384 pixels of 14-pixel patches
    reference, vit = pair(config)
    pixels = photo(config)
    expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
    actual = vit(pixels)
    assert actual.shape[1] == config.features == 25
    assert (actual - expected[:, -25:]).abs().max() < CLOSE
    pixels[..., 30:] += 1
    assert torch.equal(vit(pixels), actual)


@torch.no_grad()
def test_siglip_without_its_pooling_head() -> None:
    reference, vit = pair(SIGLIP, vision_use_head=False)
    expected = reference(photo(SIGLIP), output_hidden_states=True).hidden_states[-2]
    assert (vit(photo(SIGLIP)) - expected).abs().max() < CLOSE


@pytest.mark.parametrize("side", [42, 18])
@pytest.mark.parametrize("base", [CLIP, SIGLIP], ids=["clip", "siglip"])
@torch.no_grad()
def test_resized_positions_equal_transformers(base: VisionConfig, side: int) -> None:
    reference, vit = pair(base)
    config = dataclasses.replace(base, image_size=side)
    pixels = photo(config)
    outputs = reference(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    expected = outputs.hidden_states[-2]
    state = vit.state_dict()
    state["positions"] = resize_positions(state["positions"], base.grid, config.grid, vit.has_class_token)
    tower = ViT(config).eval()
    tower.load_state_dict(state)
    assert (tower(pixels) - expected[:, -config.features :]).abs().max() < CLOSE


def test_positions_of_the_same_grid_stay() -> None:
    positions = torch.randn(26, 4)
    assert resize_positions(positions, 5, 5, True) is positions
    assert torch.equal(resize_positions(positions, 5, 7, True)[0], positions[0])
    assert resize_positions(positions.half()[1:], 5, 7, False).shape == (49, 4)


def test_blocks_beyond_the_chosen_state_do_not_run() -> None:
    tower = ViT(dataclasses.replace(CLIP, layer=1)).eval()
    for block in tower.blocks[1:]:
        block.requires_grad_(False)
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    assert tower(photo(CLIP)).isfinite().all()
    assert sum(name.startswith("blocks.2.") for name in tower.state_dict()) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select": "full"}, "a clip tower cannot select 'full' features; use one of patch, cls_patch"),
        ({"kind": "siglip"}, "a siglip tower cannot select 'patch' features; use full"),
        ({"activation": "relu"}, "activation 'relu' is unknown; use one of quick_gelu, gelu, gelu_tanh"),
        ({"layer": 4}, "has hidden states -4 to 3, the config's layer is 4"),
        ({"layer": -5}, "has hidden states -4 to 3, the config's layer is -5"),
        ({"heads": 5}, "width 32 cannot be shared by 5 heads evenly"),
        ({"heads": 0}, "width 32 cannot be shared by 0 heads evenly"),
    ],
)
def test_impossible_towers_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ViT(dataclasses.replace(CLIP, **change))
