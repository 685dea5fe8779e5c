"""What a model computes must be finite numbers; where it is not, name the weights to blame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pumice.errors import WorkError, some
from pumice.model.quantized import PackedEmbedding, PackedLinear


def check_finite(model: nn.Module, values: Tensor) -> None:
    """Raise WorkError unless all values, which the model computed, are finite."""
    if not bool(values.isfinite().all()):
        raise WorkError(why_not_finite(model))


def finite_rows(values: Tensor) -> Tensor:
    """Return for each row of (R, V) whether all its values are finite: (R,) bool."""
    # A sum is finite only if all its terms are, and costs a fraction of a comparison of each.
    return values.sum(-1, dtype=torch.float32).isfinite()


def why_not_finite(model: nn.Module) -> str:
    """Return a sentence for users. It reads all weights, so call it only after a failure."""
    spoiled = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    # Packed matrices are not in the state: their scales may be spoiled.
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            finite = all(bool(parts.halves.isfinite().all()) for _, parts in module.packed.parts())
            spoiled += [] if finite else [f"{name}.weight"]
    what = "the model computes values that are not finite numbers"
    if not spoiled:
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            remedy = "float16 is too narrow for it; open it in float32 or bfloat16"
            return f"{what}, although its weights are: {remedy}"
        return f"{what}, although its weights are; get the model again"
    return f"{what}, as its weights {some(spoiled, 3)} hold nan or inf; get the model again"
