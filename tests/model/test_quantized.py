"""Decoders whose matrices are packed: what their weights stand for, by every way of computing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pumice.config import DecoderConfig, LoraConfig
from pumice.errors import InputError, WorkError
from pumice.kernels import compute
from pumice.kernels.packed import BlockFormat, packed_size
from pumice.model.adapters import add_lora, merge_lora
from pumice.model.cache import KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.layers import Causal
from pumice.model.quantized import PackedEmbedding, PackedLinear, kind_of, quantize
from pumice.model.quantized_base import quantize_base

BITS = pytest.mark.parametrize("bits", ["int8", "int4"])
FAMILIES = pytest.mark.parametrize("more", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tied_head": True}])


def make(dtype: torch.dtype = torch.float32, **more: bool) -> Decoder:
    config = DecoderConfig(
        vocab_size=50, width=64, depth=2, heads=4, kv_heads=2, head_dim=24, mlp_width=160, **more
    )
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.15) if parameter.dim() == 2 else parameter.data.uniform_(0.5, 1.5)
    return decoder.to(dtype)


@torch.no_grad()
def logits(decoder: Decoder, rows: int = 2, tokens: int = 7) -> Tensor:
    ids = torch.arange(rows * tokens).view(rows, tokens)
    positions = torch.arange(tokens).expand(rows, tokens)
    return decoder.logits(decoder(decoder.embed(ids), positions, Causal(decoder.config))).float()


def difference(x: Tensor, expected: Tensor) -> float:
    """The norm of the difference, of the norm of what is expected."""
    return ((x - expected).norm() / expected.norm()).item()


def restore(decoder: Decoder) -> Decoder:
    """A plain decoder whose weights are what the packed ones stand for."""
    plain = Decoder(decoder.config).eval().requires_grad_(False)
    state = decoder.state_dict()
    for name, layer in decoder.named_modules():
        if isinstance(layer, PackedLinear | PackedEmbedding):
            state[f"{name}.weight"] = layer.packed.restored()
    plain.load_state_dict(state)
    return plain


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "replace",
    [
        lambda decoder: quantize(decoder, "int8"),
        lambda decoder: quantize_base(decoder, "int8"),
        lambda decoder: add_lora(decoder, LoraConfig(targets=("gate",))),
    ],
)
def test_a_layer_that_was_edited_is_not_replaced(replace: Callable[[Decoder], None]) -> None:
    """Its successor would take the weight over, and nothing else."""
    decoder = make()
    decoder.blocks[1].mlp.gate = Doubled(64, 160, bias=False)
    with pytest.raises(InputError, match=r"gate is a Doubled, which would be lost where layers are replaced"):
        replace(decoder)
    decoder = make()
    decoder.blocks[0].mlp.gate.register_forward_hook(lambda _, inputs, output: -output)
    with pytest.raises(InputError, match=r"gate has hooks, which would be lost"):
        replace(decoder)
    decoder = make()
    gate = decoder.blocks[0].mlp.gate
    gate.__dict__["forward"] = lambda x: -nn.Linear.forward(gate, x)
    with pytest.raises(InputError, match=r"gate has a forward of its own, which would be lost"):
        replace(decoder)


@BITS
@FAMILIES
def test_a_decoder_computes_what_its_weights_stand_for(
    bits: str, more: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make(**more)
    before = logits(decoder)
    quantize(decoder, bits)
    assert not any(isinstance(module, nn.Linear | nn.Embedding) for module in decoder.modules())
    assert isinstance(decoder.embed, PackedEmbedding)
    assert decoder.head is None if decoder.config.tied_head else isinstance(decoder.head, PackedLinear)
    after, expected = logits(decoder), logits(restore(decoder))
    rounding, error = difference(after, expected), difference(expected, before)
    print(f"{bits} {more}: {rounding:.1e} by activations, {error:.1e} by weights")
    assert rounding < 0.03  # activations of 8 bits; measured worst: 2.4e-2
    # Random weights, the hardest to round; measured worst: 2.6e-2 and 2.9e-1
    assert 0 < error < {"int8": 0.04, "int4": 0.4}[bits]
    monkeypatch.setattr(compute, "library", lambda: None)
    assert difference(logits(decoder), expected) < 1e-6  # without compiled code activations are not rounded


def test_a_tied_projection_is_held_once_on_any_device() -> None:
    """It is the largest matrix of a small model: moving a decoder must not copy it twice."""
    tied, plain = make(tied_head=True), make()
    for decoder in (tied, plain):
        quantize(decoder, "int8")
    for device in ("cpu", "meta"):
        sizes = [sum(buffer.nbytes for buffer in decoder.to(device).buffers()) for decoder in (tied, plain)]
        assert sizes[1] - sizes[0] == packed_size(BlockFormat.Q8_0, 50, 64)


@BITS
def test_a_prompt_and_an_answer_get_the_same_numbers(bits: str) -> None:
    decoder = make()
    quantize(decoder, bits)
    at_once = logits(decoder, rows=1, tokens=40)
    cache = KVCache(decoder.config, 40, torch.device("cpu"), torch.float32)
    steps = []
    for token in range(40):
        x = decoder.embed(torch.tensor([[token]]))
        with torch.no_grad():
            segments = [Segment([0], token, 1)]
            hidden = decoder(x, cache.positions(segments), cache.attend(segments))
            steps.append(decoder.logits(hidden)[0].float())
    # An activation that rounds the other way moves more than fp32 does.
    assert difference(torch.cat(steps), at_once[0]) < 5e-3


@BITS
def test_any_type_of_weights_becomes_fp32_activations_and_a_bf16_cache(bits: str) -> None:
    decoder = make(torch.bfloat16, qkv_bias=True)
    quantize(decoder, bits)
    assert decoder.dtype == torch.float32
    assert decoder.cache_dtype == torch.bfloat16
    assert decoder.embed(torch.tensor([1])).dtype == torch.float32
    assert logits(decoder).isfinite().all()
    with pytest.raises(TypeError, match="is quantised"):
        _ = decoder.head_weight


def test_kinds() -> None:
    assert kind_of("int4", "blocks.0.mlp.up.weight", 512) is BlockFormat.Q4_K
    assert kind_of("int4", "blocks.0.mlp.up.weight", 576) is BlockFormat.Q4_1
    assert kind_of("int8", "blocks.0.mlp.up.weight", 512) is BlockFormat.Q8_0
    assert {kind_of("int4", name, 512) for name in ("embed.weight", "head.weight")} == {BlockFormat.Q8_0}
    with pytest.raises(InputError, match=re.escape("x has rows of 40 weights, not whole groups of 32")):
        kind_of("int4", "x", 40)
    with pytest.raises(InputError, match="to int8 or int4, not 'int3'"):
        quantize(make(), "int3")


def test_a_weight_that_is_not_finite_is_named() -> None:
    decoder = make()
    decoder.blocks[1].mlp.down.weight[3, 4] = torch.nan
    with pytest.raises(
        WorkError, match=re.escape("blocks.1.mlp.down.weight holds a weight that is not finite")
    ):
        quantize(decoder, "int8")


@BITS
def test_adapters_that_are_not_merged_are_refused(bits: str) -> None:
    decoder = make()
    add_lora(decoder, LoraConfig(rank=2, targets=("v",)))
    with pytest.raises(InputError, match=r"attention\.v is a LoraLinear, which would be lost"):
        quantize(decoder, bits)
    merge_lora(decoder)
    quantize(decoder, bits)
    with pytest.raises(InputError, match="to int8 or int4, not 'int3'"):
        quantize(make(), "int3")
