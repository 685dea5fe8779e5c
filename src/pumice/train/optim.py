"""The optimiser of a stage: one group per part, the learning rate over time, gradient norms and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pumice.errors import InputError, library
from pumice.train.parallel import World
from pumice.train.recipe import Recipe


def make_optimizer(
    recipe: Recipe, trainable: Mapping[str, nn.Parameter], part_of: Callable[[str], str], device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW with one group per part that learns; a group's `peak` is its peak learning rate.

    Raises InputError when a part has no parameters, or adamw8bit is asked for and bitsandbytes does not load.
    """
    # One group per part, because each part has its own learning rate and gradient norm.
    groups = [
        {
            "params": [p for n, p in trainable.items() if part_of(n) == part],
            "lr": rate,
            "peak": rate,
            "part": part,
        }
        for part, rate in recipe.stage.learn.items()
    ]
    for group in groups:
        if not group["params"]:
            raise InputError(f"stage.learn names {group['part']}, but the model has no such part")
    options: dict[str, Any] = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw8bit":
        bitsandbytes = library("bitsandbytes.optim", "optimizer: adamw8bit needs bitsandbytes", "qlora")
        optimizer: torch.optim.Optimizer = bitsandbytes.AdamW8bit(groups, **options)
        return optimizer
    return torch.optim.AdamW(groups, **options, fused=device.type != "mps")


def gradient_norms(optimizer: torch.optim.Optimizer, world: World) -> dict[str, float]:
    """Return each part's gradient norm before clipping; 0 for a part without gradients."""
    return {
        group["part"]: math.sqrt(world.sum_of_squares(p.grad for p in group["params"] if p.grad is not None))
        for group in optimizer.param_groups
    }


@torch.no_grad()
def clip(optimizer: torch.optim.Optimizer, norm: float, max_norm: float) -> None:
    """Scale the gradients, whose total norm is `norm`, down to `max_norm` if they are larger."""
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the peak rate at 0 <= step < steps: linear warm-up, then a cosine to zero."""
    warmup_steps = math.ceil(steps * warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
