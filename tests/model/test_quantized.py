"""int8 and int4 as module swaps: bounded when rounded, the same by every way of computing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pumice.config import DecoderConfig, LoraConfig
from pumice.errors import InputError
from pumice.model.adapters import add_lora, merge_lora
from pumice.model.cache import KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.layers import Attention, Causal
from pumice.model.quantized import (
    GROUP,
    Int4Linear,
    Int8Linear,
    has_int4_kernel,
    has_int8_kernel,
    quantize,
)

KERNELS = pytest.mark.skipif(
    not (has_int8_kernel() and has_int4_kernel()), reason="this PyTorch has no kernels for this CPU"
)
KIND = pytest.mark.parametrize("kind", ["int8", "int4"])
FAMILIES = pytest.mark.parametrize("more", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tied_head": True}])
LAYERS = {"int8": Int8Linear, "int4": Int4Linear}


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
    return decoder.logits(decoder(decoder.embed(ids), positions, Causal())).float()


def away(x: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected value."""
    return ((x.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def restore(decoder: Decoder) -> Decoder:
    """A plain decoder, q, k and v apart, whose weights are what the quantised ones stand for."""
    plain = Decoder(decoder.config).eval().requires_grad_(False)
    plain.embed.weight.copy_(decoder.embed.weight)
    plain.norm.weight.copy_(decoder.norm.weight)
    for ours, theirs in zip(plain.blocks, decoder.blocks, strict=True):
        small = {name: m for name, m in theirs.named_modules() if isinstance(m, Int8Linear | Int4Linear)}
        state = {name: value for name, value in theirs.state_dict().items() if "norm" in name}
        for name, layer in small.items():
            parent, _, last = name.rpartition(".")
            parts = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(last, (last,))
            sizes = [getattr(getattr(ours, parent), part).out_features for part in parts]
            for part, weight in zip(parts, layer.restored(torch.float32).split(sizes), strict=True):
                state[f"{parent}.{part}.weight"] = weight
            if layer.bias is not None:
                for part, bias in zip(parts, layer.bias.split(sizes), strict=True):
                    state[f"{parent}.{part}.bias"] = bias
        ours.load_state_dict(state)
    assert isinstance(decoder.head, Int8Linear)
    plain.head = nn.Linear(plain.config.width, plain.config.vocab_size, bias=False)
    plain.head.weight = nn.Parameter(decoder.head.restored(torch.float32), requires_grad=False)
    return plain


def test_int8_rounds_each_weight_by_half_a_step_of_its_row() -> None:
    torch.manual_seed(1)
    weight = torch.randn(9, 64) * torch.logspace(-3, 2, 9)[:, None]  # rows of very different sizes
    weight[4] = 0
    layer = Int8Linear(weight)
    step = weight.abs().amax(1) / 127
    assert ((layer.restored(torch.float32) - weight).abs().amax(1) <= step * 0.5 * (1 + 1e-5)).all()
    assert layer.weight.abs().amax(1).tolist() == [127] * 4 + [0] + [127] * 4
    x = torch.randn(5, 64)
    bound = x.abs().sum(1)[:, None] * step * 0.5
    assert ((layer(x) - x @ weight.T).abs() <= bound * (1 + 1e-4) + 1e-6).all()
    assert layer(x)[:, 4].eq(0).all()


@pytest.mark.parametrize("rows", [16, 70])  # 70 is no whole number of the kernel's tiles
def test_int4_rounds_each_weight_by_half_a_step_of_its_group(rows: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(rows, 4 * GROUP) * torch.logspace(-3, 2, 4).repeat_interleave(GROUP) + 0.3
    weight[:, GROUP : 2 * GROUP] = 0.25  # a group that has no spread
    groups = weight.view(rows, 4, GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (Int4Linear(weight).restored(torch.float32) - weight).view(rows, 4, GROUP).abs().amax(-1)
    assert (error <= step * 0.5 * (1 + 1e-4) + 1e-6).all()
    kept = Int4Linear(weight.bfloat16()).restored(torch.float32)
    error = (kept - weight.bfloat16().float()).view(rows, 4, GROUP).abs().amax(-1)
    # scale and offset have 8 bits: the ends of a group may lie a little outside of what is reached
    assert (error <= step * 0.6 + groups.abs().amax(-1) * 2**-7).all()


def test_what_was_on_the_grid_of_int4_stays() -> None:
    numbers = torch.arange(16).repeat(2 * 64 * GROUP // 16).view(64, 2 * GROUP)
    weight = numbers * 0.5 - 3
    assert torch.equal(Int4Linear(weight).restored(torch.float32), weight)
    assert torch.equal(Int4Linear(weight.bfloat16()).restored(torch.float32), weight)


@KIND
def test_the_bias_and_the_shape_are_kept(kind: str) -> None:
    linear = nn.Linear(32, 16)
    layer = LAYERS[kind](linear.weight, linear.bias)
    x = torch.randn(2, 3, 32)
    y = layer(x)
    assert y.shape == (2, 3, 16)
    assert (y - linear(x)).abs().max() < {"int8": 0.05, "int4": 0.4}[kind]
    assert torch.equal(layer(torch.zeros(1, 32))[0], linear.bias)


@KERNELS
@KIND
def test_no_rows_are_none(kind: str) -> None:
    """As the last block has where a step reads a prompt's first part alone."""
    layer = LAYERS[kind](torch.randn(48, 96).bfloat16(), torch.randn(48).bfloat16())
    assert layer.kernel
    assert layer(torch.zeros(1, 0, 96).bfloat16()).shape == (1, 0, 48)


@KERNELS
@KIND
@pytest.mark.parametrize("outputs", [48, 128])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_kernels_and_the_way_without_them_compute_the_same(kind: str, outputs: int, rows: int) -> None:
    torch.manual_seed(2)
    weight = torch.randn(outputs, 96)
    layer = LAYERS[kind](weight.bfloat16(), torch.randn(outputs).bfloat16())
    assert layer.kernel
    x = torch.randn(1, rows, 96).bfloat16()
    expected = x.float() @ layer.restored(torch.float32).T + layer.bias.float()
    difference = away(layer(x), expected)
    print(f"{kind}: {difference:.1e}")
    assert difference < 2**-7  # bf16 keeps 8 bits; measured worst: 5.4e-3
    without = LAYERS[kind](weight.bfloat16().float(), layer.bias.float())  # fp32 has no kernel
    assert not without.kernel
    # scales and offsets of 8 bits instead of 24 move weights to the next number of a few bits
    assert away(layer(x), without(x.float())) < {"int8": 0.01, "int4": 0.05}[kind]


@KERNELS
def test_int4_does_without_the_kernel_where_its_packing_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(64, 96).bfloat16(), torch.randn(40, 96).bfloat16()
    expected = Int4Linear(weight)(x)
    monkeypatch.setattr("pumice.model.quantized._packed_outputs", lambda: None)
    layer = Int4Linear(weight)
    assert not layer.kernel
    assert away(layer(x), expected) < 2**-7  # bf16 keeps 8 bits


@KIND
@FAMILIES
def test_a_quantised_decoder_computes_what_its_weights_stand_for(kind: str, more: dict[str, bool]) -> None:
    decoder = make(**more)
    before, embedding = logits(decoder), decoder.embed.weight.clone()
    quantize(decoder, kind)
    assert not any(isinstance(module, nn.Linear) for module in decoder.modules())
    assert isinstance(decoder.head, Int8Linear)
    assert torch.equal(decoder.embed.weight, embedding)
    after = logits(decoder)
    difference = away(after, logits(restore(decoder)))
    error = ((after - before).norm() / before.norm()).item()
    print(f"{kind} {more}: {difference:.1e} from the restored, {error:.1e} from the unquantised")
    assert difference < 5e-6  # measured worst: 1.5e-6
    # Random weights, the hardest to round; measured worst: 2.6e-2 and 3.1e-1.
    assert 0 < error < {"int8": 0.04, "int4": 0.45}[kind]


@KERNELS
@KIND
def test_a_bf16_decoder_decodes_with_its_kernels_what_it_prefills_without(kind: str) -> None:
    decoder = make(torch.bfloat16)
    quantize(decoder, kind)
    whole = logits(decoder, rows=1, tokens=40)
    cache = KVCache(decoder.config, 40, torch.device("cpu"), torch.bfloat16)
    steps = []
    for token in range(40):
        x = decoder.embed(torch.tensor([[token]]))
        with torch.no_grad():
            segments = [Segment(0, token, 1)]
            hidden = decoder(x, cache.positions(segments), cache.attend(segments))
            steps.append(decoder.logits(hidden)[0].float())
    difference = away(torch.cat(steps), whole[0])
    print(f"{kind}: {difference:.1e}")
    assert difference < 0.05  # bf16 through two blocks; measured worst: 2.1e-2


def test_int4_leaves_rows_without_whole_groups_and_the_head_to_int8() -> None:
    config = DecoderConfig(vocab_size=50, width=64, depth=1, heads=4, kv_heads=2, head_dim=16, mlp_width=40)
    decoder = Decoder(config)
    quantize(decoder, "int4")
    block = decoder.blocks[0]
    assert isinstance(block.mlp.gate_up, Int4Linear)
    assert isinstance(block.mlp.down, Int8Linear)
    assert isinstance(decoder.head, Int8Linear)
    with pytest.raises(InputError, match="whole groups of 32; a row has 40 weights"):
        Int4Linear(torch.randn(8, 40))


def test_int4_takes_a_little_more_than_half_a_byte_per_weight() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = Int4Linear(torch.randn(128, 256).to(dtype))
        size = sum(buffer.nbytes for buffer in layer.buffers())
        assert size == 128 * 256 // 2 + 128 * 256 // GROUP * 2 * dtype.itemsize


def test_training_keeps_its_parameter_names() -> None:
    decoder = make()
    assert all(
        name in decoder.state_dict() for name in ("blocks.0.attention.q.weight", "blocks.1.mlp.up.weight")
    )
    quantize(decoder, "int8")
    attention = decoder.blocks[0].attention
    assert isinstance(attention, Attention)
    assert attention.qkv is not None
    assert not hasattr(attention, "q")


@KIND
def test_adapters_that_are_not_merged_are_refused(kind: str) -> None:
    decoder = make()
    add_lora(decoder, LoraConfig(rank=2, targets=("v",)))
    with pytest.raises(InputError, match="merge the LoRA adapters before quantising"):
        quantize(decoder, kind)
    merge_lora(decoder)
    quantize(decoder, kind)
    with pytest.raises(InputError, match="to int8 or int4, not 'int3'"):
        quantize(make(), "int3")
