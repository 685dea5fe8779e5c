"""LoRA: changes to linear layers as module swaps, folded into the weights when training is done.

Knows tensors and module trees; nothing of what the layers are for. Only the decoder is ever
adapted: the tower and the connector stay as they are.
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
        self.train(base.training)  # in a model that answers, no dropout acts

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return super().forward(x) + F.linear(F.linear(low, self.lora_a) * self.scale, self.lora_b)

    def merged(self) -> nn.Linear:
        """A plain layer with W + alpha / rank * B A, in the type of W."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        a, b, plain = self.lora_a.detach().float(), self.lora_b.detach().float(), self.weight.detach()
        weight = torch.addmm(plain.float(), b, a, alpha=self.scale).to(plain.dtype)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


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
