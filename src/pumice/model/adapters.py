"""Changes to linear layers as module swaps: LoRA while training, int8 weights while answering.

Knows tensors and module trees; nothing of what the layers are for. Only the decoder is ever
adapted or quantised: the tower and the connector stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.config import LoraConfig
from pumice.errors import InputError


class LoraLinear(nn.Linear):
    """y = W x + alpha / rank * B A x (arXiv 2106.09685). W is the swapped layer's own parameter."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return super().forward(x) + F.linear(F.linear(low, self.lora_a) * self.scale, self.lora_b)

    def merged(self) -> nn.Linear:
        """A plain layer with W + alpha / rank * B A, in the type of W."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        update = self.scale * (self.lora_b.float() @ self.lora_a.float())
        weight = (self.weight.detach().float() + update.detach()).to(self.weight.dtype)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


# Above so many rows the product costs more than reading the weights, and bf16's is the faster one.
KERNEL_ROWS = 16


def has_int8_kernel() -> bool:
    """Whether this PyTorch multiplies bf16 activations with int8 weights on the CPU without a detour."""
    return hasattr(torch, "_weight_int8pack_mm")


class Int8Linear(nn.Module):
    """Weight-only int8: one scale per output row, absolute maximum to 127; no bias is quantised."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        # Rounded to its final type first, so that weights are divided by what multiplies them later.
        scale = (weight.detach().abs().amax(1).float().clamp_min(1e-7) / 127).to(weight.dtype)
        rounded = weight.detach().to(torch.float32, copy=True).div_(scale.float()[:, None]).round_()
        self.register_buffer("weight", rounded.clamp_(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        few = len(rows) <= KERNEL_ROWS and not x.requires_grad  # the kernel has no derivative
        if few and x.device.type == "cpu" and x.dtype == torch.bfloat16 and has_int8_kernel():
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _linears(root: nn.Module, names: tuple[str, ...] | None) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and (names is None or name in names):
                yield parent, name, child


def add_lora(decoder: nn.Module, config: LoraConfig) -> None:
    """Swap the decoder's layers named in `config.targets` for LoRA ones. InputError when none is found."""
    found = set()
    for parent, name, child in _linears(decoder, config.targets):
        setattr(parent, name, LoraLinear(child, config))
        found.add(name)
    if missing := set(config.targets) - found:
        raise InputError(f"LoRA: the decoder has no linear layer named {', '.join(sorted(missing))}")


def merge_lora(decoder: nn.Module) -> None:
    """Fold every LoRA update into its weight; the decoder computes the same with plain layers."""
    for parent, name, child in _linears(decoder, None):
        if isinstance(child, LoraLinear):
            setattr(parent, name, child.merged())


def quantize_int8(decoder: nn.Module) -> None:
    """Swap every plain linear layer of the decoder for its int8 form.

    A tied vocabulary projection gets an int8 copy; the embedding stays as it is, to look tokens up in.
    """
    for parent, name, child in _linears(decoder, None):
        if isinstance(child, LoraLinear):
            raise InputError("merge the LoRA adapters before quantising")
        setattr(parent, name, Int8Linear(child.weight, child.bias))
    if decoder.head is None:
        decoder.head = Int8Linear(decoder.embed.weight)
