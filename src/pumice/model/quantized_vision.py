"""Quantise the matrices of a ViT's MLPs, two thirds of its products, for answers on a CPU.

They become GGUF's Q8_0, whatever the bits of the decoder: this is for speed. Attention is more sensitive to
rounding, so its matrices stay as they are (docs/measurements/speed.md).

Shapes: N outputs, K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from pumice.kernels.compute import multiplies_fast, quantize
from pumice.kernels.packed import GROUP, BlockFormat
from pumice.model.quantized import PackedLinear
from pumice.model.vision import ViT, ViTMLP, WideningLinear, multiplies_tiles


def quantized_shapes(tower: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (N, K) of each matrix that answers on this CPU quantise, by its name in the tower.

    K is rounded up to whole groups of 32. There are none on a processor that does not multiply integers
    faster (AVX-512 VNNI, AVX-VNNI, NEON with dot products), or multiplies bfloat16 faster still (AMX).
    """
    return {
        f"{name}.weight": (layer.out_features, -(-layer.in_features // GROUP) * GROUP)
        for name, layer in _layers(tower)
    }


def quantize_vision(tower: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Replace the layers of `quantized_shapes`. read(name) returns a weight of the tower, with any dtype.

    Raise WorkError if a weight is not finite.
    """
    for name, layer in list(_layers(tower)):
        weight = read(f"{name}.weight")
        packed = quantize(F.pad(weight, (0, -weight.shape[1] % GROUP)), BlockFormat.Q8_0, f"tower.{name}")
        bias = None if layer.bias is None else layer.bias.detach()
        parent, _, child = name.rpartition(".")
        setattr(tower.get_submodule(parent), child, PackedLinear(packed, bias, layer.in_features))


def _layers(tower: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    if not isinstance(tower, ViT) or not multiplies_fast() or multiplies_tiles():
        return
    for path, module in tower.named_modules():
        if isinstance(module, ViTMLP):
            for name, layer in module.named_children():
                if type(layer) is WideningLinear:
                    yield f"{path}.{name}", layer
