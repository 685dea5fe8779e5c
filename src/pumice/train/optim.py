"""The optimiser of a stage: its groups, its rate over time, its gradients' norms.

Knows parameters by name and torch's optimisers. Does not know the model or data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from pumice.errors import InputError
from pumice.train.optional import optional
from pumice.train.parallel import World
from pumice.train.recipe import Recipe


def make_optimizer(
    recipe: Recipe, learned: Mapping[str, nn.Parameter], part_of: Callable[[str], str], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with one group per part that learns, `peak` its rate. InputError without bitsandbytes."""
    groups = [
        {
            "params": [p for n, p in learned.items() if part_of(n) == part],
            "lr": rate,
            "peak": rate,
            "part": part,
        }
        for part, rate in recipe.stage.learn.items()
    ]
    for group in groups:
        if not group["params"]:
            raise InputError(f"stage.learn names {group['part']}, but the model has no such part")
    if recipe.optimizer == "adamw8bit":
        optim = optional(
            "bitsandbytes.optim", "optimizer: adamw8bit needs bitsandbytes; pip install bitsandbytes"
        )
        found: torch.optim.Optimizer = optim.AdamW8bit(
            groups, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        return found
    return torch.optim.AdamW(
        groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=device.type != "mps"
    )


def gradient_norms(optimizer: torch.optim.Optimizer, world: World) -> dict[str, float]:
    """Norm of each part's gradient before clipping; 0 of a part that got none."""
    return {
        group["part"]: math.sqrt(world.squares(p.grad for p in group["params"] if p.grad is not None))
        for group in optimizer.param_groups
    }


@torch.no_grad()
def clip(optimizer: torch.optim.Optimizer, norm: float, largest: float) -> None:
    """Scale gradients of total norm `norm` down to `largest`; smaller ones are not touched."""
    scale = largest / (norm + 1e-6)
    if scale < 1:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at 0 <= step < steps: linear warm-up, then a cosine to zero."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
