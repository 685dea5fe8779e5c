"""LoRA as a module swap: nothing at the start, exact when merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pumice.config import DecoderConfig, LoraConfig
from pumice.errors import InputError
from pumice.model.adapters import LoraLinear, add_lora, merge_lora
from pumice.model.decoder import Decoder
from pumice.model.layers import Causal

ALL = LoraConfig().targets


def make(**more: bool) -> Decoder:
    config = DecoderConfig(
        vocab_size=50, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, **more
    )
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.15) if parameter.dim() == 2 else parameter.data.uniform_(0.5, 1.5)
    return decoder


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    tokens = torch.arange(14).view(2, 7)
    positions = torch.arange(7).expand(2, 7)
    return decoder.logits(decoder(decoder.embed(tokens), positions, Causal(decoder.config)))


def learn(decoder: Decoder) -> None:
    """Updates that are not zero, as after training."""
    for name, parameter in decoder.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_fresh_lora_changes_nothing(bias: bool) -> None:
    decoder = make(qkv_bias=bias)
    before, weights = logits(decoder), dict(decoder.state_dict())
    add_lora(decoder, LoraConfig(rank=4))
    assert torch.equal(logits(decoder), before)
    state = decoder.state_dict()
    assert {name for name in state if "lora_" not in name} == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert sum("lora_a" in name for name in state) == len(ALL) * decoder.config.depth


@pytest.mark.parametrize("bias", [False, True])
def test_merged_equals_unmerged(bias: bool) -> None:
    decoder = make(qkv_bias=bias)
    plain = logits(decoder)
    add_lora(decoder, LoraConfig(rank=4, alpha=12.0))
    learn(decoder)
    unmerged = logits(decoder)
    assert (unmerged - plain).abs().max() > 0.1
    merge_lora(decoder)
    assert not any(isinstance(module, LoraLinear) for module in decoder.modules())
    assert not any("lora_" in name for name in decoder.state_dict())
    difference = ((logits(decoder) - unmerged).abs().max() / unmerged.abs().max()).item()
    print(f"merged: {difference:.1e}")
    assert difference < 5e-6  # of the largest logit; measured worst: 1.0e-6


def test_the_update_is_alpha_over_rank_times_b_a() -> None:
    base = nn.Linear(6, 5)
    layer = LoraLinear(base, LoraConfig(rank=2, alpha=6.0))
    layer.lora_b.data.normal_()
    x = torch.randn(3, 6)
    expected = base(x) + 3.0 * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged().weight, base.weight + 3.0 * layer.lora_b @ layer.lora_a)


def test_only_the_named_layers_are_swapped_and_the_weight_is_the_same_parameter() -> None:
    decoder = make()
    weight = decoder.blocks[0].attention.q.weight
    add_lora(decoder, LoraConfig(rank=2, targets=("q", "down")))
    swapped = {name.rsplit(".", 1)[1] for name, m in decoder.named_modules() if isinstance(m, LoraLinear)}
    assert swapped == {"q", "down"}
    assert decoder.blocks[0].attention.q.weight is weight


def test_dropout_acts_on_the_update_only_and_only_in_training() -> None:
    layer = LoraLinear(nn.Linear(64, 64), LoraConfig(rank=4, dropout=0.5))
    layer.lora_b.data.normal_()
    x = torch.randn(2, 64)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    layer.lora_b.data.zero_()
    assert torch.equal(layer(x), layer.eval()(x))


def test_adapters_of_an_answering_model_have_no_dropout() -> None:
    decoder = make()  # in evaluation mode
    add_lora(decoder, LoraConfig(rank=4, dropout=0.5))
    learn(decoder)
    assert torch.equal(logits(decoder), logits(decoder))
    assert not torch.equal(logits(decoder.train()), logits(decoder))


def test_unknown_targets_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="the decoder has no linear layer named gates, wq"):
        add_lora(make(), LoraConfig(targets=("q", "wq", "gates")))
