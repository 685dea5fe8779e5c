"""Adapters over a quantised base: gradients as over its dequantised weights, and few bytes."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from pumice.config import DecoderConfig, LoraConfig
from pumice.model.adapters import LoraLinear, add_lora
from pumice.model.decoder import Decoder
from pumice.model.layers import Causal
from pumice.model.quantized_base import QuantizedLinear, quantize_base


def decoder(**changes: bool) -> Decoder:
    torch.manual_seed(0)
    new_decoder = Decoder(DecoderConfig(64, 64, 2, 4, 2, 16, 128, **changes))
    add_lora(new_decoder, LoraConfig(rank=4, targets=("q", "down")))
    for module in new_decoder.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_b, std=0.1)
    for name, parameter in new_decoder.named_parameters():
        parameter.requires_grad_("lora" in name)
    return new_decoder


def gradients(model: Decoder) -> list[torch.Tensor]:
    x, positions = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1)), torch.arange(9)[None]
    x.requires_grad_()
    model(x, positions, Causal(model.config)).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
def test_int8_computes_as_its_dequantised_weights(bias: bool) -> None:
    quantised = decoder(qkv_bias=bias)
    plain = copy.deepcopy(quantised)
    quantize_base(quantised, "int8")
    layers = dict(quantised.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            quantized_layer = layers[name]
            if isinstance(module, nn.Linear) and isinstance(quantized_layer, QuantizedLinear):
                weight = quantized_layer.packed.float() * quantized_layer.scale[:, None]
                assert (module.weight - weight).abs().max() <= module.weight.abs().max() / 127  # half a step
                module.weight.copy_(weight)
    quantized_grads, plain_grads = gradients(quantised), gradients(plain)
    assert len(quantized_grads) == len(plain_grads) == 1 + 2 * 2 * 2
    for one, other in zip(quantized_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)  # measured worst: 4e-6


def test_only_the_adapters_are_state_and_the_rest_is_small() -> None:
    model = decoder()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")]
    plain_head = model.head
    quantize_base(model, "int8")
    assert model.head is plain_head
    names = set(model.state_dict())
    assert not any(f"{name}.weight" in names for name in linears)
    assert sum("lora" in name for name in names) == 8
    held = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert held == set(linears)
    assert all(m.packed.dtype == torch.int8 for m in model.modules() if isinstance(m, QuantizedLinear))


def test_a_quantised_layer_of_an_answering_model_has_no_dropout() -> None:
    adapted = LoraLinear(nn.Linear(64, 64), LoraConfig(rank=4, dropout=0.5))
    nn.init.normal_(adapted.lora_b)
    x = torch.randn(3, 64)
    answering = QuantizedLinear(adapted.eval(), "int8")
    assert torch.equal(answering(x), answering(x))
    assert not torch.equal(answering.train()(x), answering(x))


def test_autocast_reaches_the_products() -> None:
    model = decoder()
    quantize_base(model, "int8")
    layer = model.blocks[0].attention.q
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 64)).dtype == torch.bfloat16


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is optional")
def test_nf4_computes_as_its_dequantised_weights() -> None:
    quantised = decoder()
    quantize_base(quantised, "nf4")
    layer = quantised.blocks[0].mlp.up
    x = torch.randn(5, 64)
    weight = import_module("bitsandbytes.functional").dequantize_4bit(layer.packed, layer._nf4).float()
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in gradients(quantised))
