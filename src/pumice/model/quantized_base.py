"""QLoRA (arXiv 2305.14314) trains adapters on frozen weights that are stored in 8 or 4 bits.

Only the linear layers of the decoder's blocks are quantized. Embedding, norms, vocabulary projection, tower
and connector stay as they are. A trained model is saved with its original weights: quantization only saves
memory during the run.

int8 runs on any device and has one scale per output row. nf4 needs bitsandbytes, an optional dependency.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.errors import InputError, install
from pumice.model.adapters import LoraLinear
from pumice.model.layers import check_unedited

BLOCK = 64  # nf4: weights that share a scale


class _Int8Product(torch.autograd.Function):
    """Computes x @ (q * scale).T. q is converted to floats for each product, so they are never stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return (x @ q.to(x.dtype).T) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, scale = ctx.saved_tensors
        grad = grads[0]
        return (grad * scale.to(grad.dtype)) @ q.to(grad.dtype), None, None


class QuantizedLinear(nn.Module):
    """A frozen, quantized linear layer, plus the LoRA update of the layer that it replaces, if it has one.

    The quantized weight is not part of the state: `state_dict` holds only the adapter.
    """

    packed: Tensor
    scale: Tensor
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device | None = None) -> None:
        """device: where the weight is quantised, and stays; by default where it is."""
        super().__init__()
        self.kind = kind
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().to(device or layer.weight.device)
        self._nf4: Any = None
        if kind == "int8":
            # The largest weight of a row becomes 127. Rows of zeros get a tiny scale, not a division by zero.
            scale = weight.float().abs().amax(1).clamp_min(1e-7) / 127
            packed = (weight.float() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
            self.register_buffer("scale", scale, persistent=False)
        else:
            packed, self._nf4 = _bitsandbytes().quantize_4bit(
                weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
            )
        self.register_buffer("packed", packed, persistent=False)
        self.bias = layer.bias
        self.lora_a = self.lora_b = None
        if isinstance(layer, LoraLinear):
            self.lora_a, self.lora_b = layer.lora_a, layer.lora_b
            self.lora_scale, self.dropout = layer.scale, layer.dropout
        self.train(layer.training)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        # bitsandbytes keeps its scales outside the module: move them, too.
        if self._nf4 is not None:
            self._nf4.to(self.packed.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.kind == "int8":
            y = cast(Callable[..., Tensor], _Int8Product.apply)(x, self.packed, self.scale)
        else:
            y = _matmul_4bit(x, self.packed, self._nf4)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.lora_a is None or self.lora_b is None:
            return y
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return y + F.linear(F.linear(low, self.lora_a) * self.lora_scale, self.lora_b)


def quantize_base(decoder: nn.Module, kind: str, device: torch.device | None = None) -> None:
    """Replace the linear layers of the decoder's blocks, adapters included, by frozen quantized layers.

    kind: "int8" or "nf4". device: where each weight is quantised, and stays: a GPU is many times faster.
    Layers are replaced one by one, so that each one's floats are freed before the next. Raise InputError if
    nf4's library is not installed.
    """
    for path, parent in list(decoder.get_submodule("blocks").named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                check_unedited(f"blocks.{path}.{name}", child, nn.Linear, LoraLinear)
                setattr(parent, name, QuantizedLinear(child, kind, device))


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise InputError(
            f"base: nf4 needs bitsandbytes ({install('qlora')}); base: int8 needs nothing"
        ) from error


def _matmul_4bit(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    product: Tensor = importlib.import_module("bitsandbytes").matmul_4bit(x, packed.t(), state)
    return product
