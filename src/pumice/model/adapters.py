"""LoRA trains a small update beside each frozen linear layer of the decoder, and merges it at the end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.capability import LORA, Capability, fields
from pumice.config import LoraConfig
from pumice.errors import InputError
from pumice.model.layers import check_unedited

CAPABILITY = Capability("adapters", {LoraConfig: fields(LORA)})


class LoraLinear(nn.Linear):
    """y = W x + alpha / rank * B A x (arXiv 2106.09685). W is the parameter of the replaced layer."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        # On meta, `super` allocates nothing. The layer uses the weight of the one that it replaces.
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        device = base.weight.device
        # Drawn on the CPU, so that a run starts from the same numbers on every device.
        a = torch.empty(config.rank, base.in_features, device="meta" if device.type == "meta" else "cpu")
        nn.init.kaiming_uniform_(a, a=5**0.5)
        self.lora_a = nn.Parameter(a.to(device))
        # B starts at zero, so that training starts from the unchanged model.
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        self.train(base.training)  # so that an answering model has no dropout

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return super().forward(x) + F.linear(F.linear(low, self.lora_a) * self.scale, self.lora_b)

    def merged(self) -> nn.Linear:
        """Return a plain layer with the weight W + alpha / rank * B A, in the dtype of W."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        # In fp32, so that the update is rounded only once.
        a, b, base = self.lora_a.detach().float(), self.lora_b.detach().float(), self.weight.detach()
        weight = torch.addmm(base.float(), b, a, alpha=self.scale).to(base.dtype)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


def _linear_layers(
    root: nn.Module, names: tuple[str, ...] | None
) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield (parent, name, layer) of all linear layers, or of those with one of `names`."""
    # Lists, because the caller replaces layers while it iterates.
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and (names is None or name in names):
                yield parent, name, child


def add_lora(decoder: nn.Module, config: LoraConfig) -> None:
    """Replace the decoder's layers named in `config.targets` by LoRA layers.

    Raise InputError if the decoder has no linear layer of one of these names.
    """
    CAPABILITY.check(config)
    replaced = set()
    for parent, name, child in _linear_layers(decoder, config.targets):
        check_unedited(name, child, nn.Linear)
        setattr(parent, name, LoraLinear(child, config))
        replaced.add(name)
    if missing := set(config.targets) - replaced:
        raise InputError(f"LoRA: the decoder has no linear layer named {', '.join(sorted(missing))}")


def merge_lora(decoder: nn.Module) -> None:
    """Replace all LoRA layers by plain layers with the same outputs."""
    for parent, name, child in _linear_layers(decoder, None):
        if isinstance(child, LoraLinear):
            setattr(parent, name, child.merged())
