"""Packed matrices: GGUF's blocks in and out bit for bit, quantised weights as near as their bits allow."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch

from pumice.errors import InputError, WorkError
from pumice.kernels import compute
from pumice.kernels.compute import quantize
from pumice.kernels.packed import GROUP, BlockFormat, from_blocks, packed_size

KINDS = pytest.mark.parametrize("kind", BlockFormat, ids=lambda kind: kind.name)
QUANTIZED_KINDS = pytest.mark.parametrize(
    "kind", [BlockFormat.Q8_0, BlockFormat.Q4_1, BlockFormat.Q4_K], ids=lambda kind: kind.name
)
COMPILED = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "PyTorch"])


@pytest.fixture
def implementation(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and compute.library() is None:
        pytest.skip("there is no compiled code")
    if not compiled:
        monkeypatch.setattr(compute, "library", lambda: None)


@KINDS
@pytest.mark.parametrize("outputs", [16, 37])
def test_blocks_go_in_and_out_bit_for_bit(kind: BlockFormat, outputs: int) -> None:
    shape = (outputs, 1024 // kind.block, kind.block_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    halves = 2 if kind in (BlockFormat.Q8_0, BlockFormat.Q4_0) else 4
    blocks[..., :halves] = torch.rand(*shape[:2], halves // 2).half().view(torch.uint8)
    packed = from_blocks(kind, blocks)
    assert len(packed.data) == packed_size(kind, outputs, 1024)
    assert torch.equal(packed.blocks(), blocks)
    form = gguf.GGMLQuantizationType(kind.ggml)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.view(outputs, -1).numpy(), form))
    assert torch.equal(packed.restored(), expected)
    ids = torch.tensor([[3, 0], [15, outputs - 1]])
    assert torch.equal(packed.rows(ids), expected[ids])


def test_bits_of_a_weight() -> None:
    sizes = {kind.name: packed_size(kind, 4096, 4096) * 8 / 4096**2 for kind in BlockFormat}
    assert sizes == {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q4_K": 4.625}


@QUANTIZED_KINDS
@COMPILED
@pytest.mark.usefixtures("implementation")
def test_rounds_about_as_well_as_ggml(kind: BlockFormat, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(70, 1024, generator=generator)
    weight *= 2 ** torch.randn(70, 1024, generator=generator)  # heavy tails
    weight[:, ::300] *= 20
    error = ((quantize(weight, kind).restored() - weight).norm() / weight.norm()).item()
    # The gguf package makes no Q4_K, which is to be as good as Q4_1.
    form = gguf.GGMLQuantizationType((BlockFormat.Q4_1 if kind is BlockFormat.Q4_K else kind).ggml)
    ggml_restored = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), form), form)
    expected = np.linalg.norm(ggml_restored - weight.numpy()) / np.linalg.norm(weight.numpy())
    print(f"{kind.name}: {error:.4f}, ggml {expected:.4f}")
    assert error <= expected * 1.001


@QUANTIZED_KINDS
@COMPILED
@pytest.mark.usefixtures("implementation")
def test_extreme_weights(kind: BlockFormat, compiled: bool) -> None:
    weight = torch.randn(21, 512, generator=torch.Generator().manual_seed(2))
    weight[0] = 0
    weight[1] = 0.25
    weight[2] = -3
    weight[3, 100] = 6e4
    weight[4] *= 1e-12
    weight[5] = weight[5].abs() + 5  # an offset above zero, which Q4_K has not
    restored = quantize(weight, kind).restored()
    assert restored[0].eq(0).all()
    assert restored.isfinite().all()
    assert torch.allclose(restored[1:3], weight[1:3], rtol=2e-3)
    assert restored[3, 100] == pytest.approx(6e4, rel=5e-3)
    assert (restored[4].abs() <= 1e-6).all()
    step = {BlockFormat.Q8_0: 2 * 9 / 255, BlockFormat.Q4_1: 9 / 15, BlockFormat.Q4_K: 9 / 15}[kind]
    assert (restored[5] - weight[5]).abs().max() < step


@QUANTIZED_KINDS
@COMPILED
@pytest.mark.usefixtures("implementation")
def test_the_largest_weights_that_are_taken(kind: BlockFormat, compiled: bool) -> None:
    """The offset of a group that reaches to the end of fp16 must not go beyond it."""
    weight = compute.LARGEST * torch.rand(64, 512, generator=torch.Generator().manual_seed(4))
    weight[::2] *= -1
    restored = quantize(weight, kind).restored()
    step = compute.LARGEST / (127 if kind is BlockFormat.Q8_0 else 15)
    assert (restored - weight).abs().max() < step  # measured worst: 0.91 (Q4_K)


@COMPILED
@pytest.mark.usefixtures("implementation")
def test_weights_on_the_grid_stay(compiled: bool) -> None:
    numbers = torch.arange(16).repeat(4 * GROUP).view(8, 8 * GROUP)
    weight = numbers * 0.5 - 3
    assert torch.equal(quantize(weight, BlockFormat.Q4_1).restored(), weight)
    assert torch.equal(quantize(weight.half(), BlockFormat.Q4_1).restored(), weight)
    eight = (torch.arange(256).view(1, 256) % 255 - 127) * 0.125
    eight[0, ::GROUP] = 127 * 0.125
    assert torch.equal(quantize(eight.bfloat16(), BlockFormat.Q8_0).restored(), eight.bfloat16().float())


@COMPILED
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused(compiled: bool, value: float, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 256)
    weight[33, 7] = weight[39, 0] = value
    with pytest.raises(WorkError, match=r"blocks\.0 holds a weight that is not finite in row 33; get"):
        quantize(weight.to(dtype), BlockFormat.Q4_K, "blocks.0")


@QUANTIZED_KINDS
@COMPILED
@pytest.mark.usefixtures("implementation")
def test_a_weight_that_no_scale_can_hold_is_refused(kind: BlockFormat, compiled: bool) -> None:
    weight = torch.randn(40, 256)
    weight[20, 3] = -65504  # the largest
    quantize(weight, kind, "blocks.0")
    weight[33, 7] = 1e37
    with pytest.raises(
        WorkError, match=r"blocks\.0 holds a weight beyond 65504 in row 33, .*--quantize none"
    ):
        quantize(weight, kind, "blocks.0")


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(InputError, match=re.escape("x has rows of 40 weights, not whole groups of 32")):
        quantize(torch.randn(4, 40), BlockFormat.Q8_0, "x")
    with pytest.raises(InputError, match="not whole groups of 256"):
        quantize(torch.randn(4, 64), BlockFormat.Q4_K)
