"""Quantise a decoder for answering: replace its linear layers and its embedding by packed matrices.

Norms, biases, the tower and the connector stay as they are. Activations are fp32 between layers; on a CPU a
product rounds them to 8 bits.

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pumice.errors import InputError
from pumice.kernels.compute import check_rows, linear
from pumice.kernels.compute import quantize as quantize_weight
from pumice.kernels.packed import BlockFormat, PackedMatrix
from pumice.model.layers import ScaledEmbedding, check_unedited

KINDS = ("int8", "int4")


class PackedLinear(nn.Module):
    """A linear layer whose weight is a packed matrix."""

    data: Tensor

    def __init__(
        self, packed: PackedMatrix, bias: Tensor | None = None, in_features: int | None = None
    ) -> None:
        """in_features: fewer than the matrix has inputs, if it was padded to whole groups."""
        super().__init__()
        self.kind, self.out_features, self._padded = packed.kind, packed.outputs, packed.inputs
        self.in_features = packed.inputs if in_features is None else in_features
        self.register_buffer("data", packed.data, persistent=False)  # not in the state dict
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> PackedMatrix:
        return PackedMatrix(self.kind, self.out_features, self._padded, self.data)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias)


class PackedEmbedding(nn.Module):
    """An embedding whose rows are those of a packed matrix."""

    data: Tensor

    def __init__(self, packed: PackedMatrix, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        """scale: multiplies the rows."""
        super().__init__()
        self.scale = scale
        self.kind, self.num_embeddings, self.embedding_dim = packed.kind, packed.outputs, packed.inputs
        self.dtype = dtype
        self.register_buffer("data", packed.data, persistent=False)

    @property
    def packed(self) -> PackedMatrix:
        return PackedMatrix(self.kind, self.num_embeddings, self.embedding_dim, self.data)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.packed.rows(ids).to(self.dtype)
        return rows if self.scale == 1.0 else rows * self.scale


def kind_of(bits: str, name: str, inputs: int) -> BlockFormat:
    """Return the format of a matrix for "int8" or "int4". name: in the decoder.

    The embedding and the vocabulary projection are the most sensitive, so they always get 8 bits. int4 means
    Q4_K if `inputs` is a multiple of 256, else Q4_1. Raise InputError if it is not a multiple of 32.
    """
    if bits not in KINDS:
        raise InputError(f"weights are quantised to {' or '.join(KINDS)}, not {bits!r}")
    check_rows(name, inputs, BlockFormat.Q8_0)
    if bits == "int8" or name in ("embed.weight", "head.weight"):
        return BlockFormat.Q8_0
    return BlockFormat.Q4_1 if inputs % BlockFormat.Q4_K.block else BlockFormat.Q4_K


def quantize(decoder: Any, bits: str) -> None:
    """Quantise every matrix of a decoder on the CPU to "int8" or "int4"; activations become fp32.

    Raise InputError if `bits` are others, or a layer has adapters or was edited; WorkError if a weight is not
    finite.
    """

    def packed(name: str, weight: Tensor) -> PackedMatrix:
        return quantize_weight(weight, kind_of(bits, name, weight.shape[1]), name)

    swap(decoder, packed)


def swap(
    decoder: Any, packed: Callable[[str, Tensor], PackedMatrix], dtype: torch.dtype = torch.float32
) -> None:
    """Replace the matrices of a decoder. packed(name, weight) returns the packed matrix of a weight.

    dtype: of norms, biases and activations. Raise InputError if a layer has adapters or was edited.
    """
    for path, parent in list(decoder.named_modules()):
        for name, child in list(parent.named_children()):
            layer_name = f"{path}.{name}" if path else name
            weight_name = f"{layer_name}.weight"
            if isinstance(child, nn.Linear):
                check_unedited(layer_name, child, nn.Linear)
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, PackedLinear(packed(weight_name, child.weight), bias))
            elif isinstance(child, nn.Embedding):
                check_unedited(layer_name, child, nn.Embedding, ScaledEmbedding)
                scale = getattr(child, "scale", 1.0)
                setattr(parent, name, PackedEmbedding(packed(weight_name, child.weight), dtype, scale))
    decoder.to(dtype)  # changes floats only: packed matrices are integers
