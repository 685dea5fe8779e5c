"""What a stage holds from its first step to its last, and what it writes: both follow from shapes alone.

Knows configs and which parts learn. Does not know a step: what is alive only while one runs is `footprint`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pumice.config import ModelConfig
from pumice.model.llava import Llava
from pumice.train.recipe import Recipe
from pumice.train.setup import learned, part_of

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # of a weight: its bits, and doubly quantised scales of 64 weights


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and bytes."""

    parameters: dict[str, int]  # part -> numbers
    learning: int  # numbers that learn
    weights: float  # in memory, as are the next two
    gradients: float
    optimizer: float
    files: float  # pages of frozen tensors that memory holds in another form, a CPU's
    model: float  # on disk, as is the next one
    checkpoint: float

    @property
    def held(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def disk(self, keep_last: int) -> float:
        """The last checkpoints, one more while it is written, and the finished model."""
        return self.checkpoint * (keep_last + 1) + self.model


def sizes(recipe: Recipe, config: ModelConfig, device: str) -> Sizes:
    """The sizes of the recipe's stage on a device of this type ("cpu", "cuda").

    config: with the stage's fresh adapters.
    """
    with torch.device("meta"):
        model = Llava(config)
    learn, base = recipe.stage.learn, recipe.stage.base
    learning = learned(model, learn)
    parameters: dict[str, int] = {}
    weights = files = 0.0
    stored = 2 if recipe.precision == "bf16" else 4
    for name, parameter in model.named_parameters():
        numbers, part = parameter.numel(), part_of(name, learn)
        parameters[part] = parameters.get(part, 0) + numbers
        if name in learning or base == "none" or not _in_few_bits(name, parameter):
            weights += numbers * kept_as(name, name in learning, recipe, device).itemsize
        else:
            weights += numbers * NF4_BYTES if base == "nf4" else numbers + 4 * len(parameter)
            files += stored * numbers  # they were read once, and will be again when the model is saved
        if name not in learning and (stored == 2 or (base != "none" and _in_few_bits(name, parameter))):
            files += stored * numbers
    for name, buffer in model.named_buffers():
        kept = kept_as(name, False, recipe, device) if buffer.is_floating_point() else buffer.dtype
        weights += buffer.numel() * kept.itemsize
    count = sum(parameter.numel() for parameter in learning.values())
    gradients = 4.0 * count
    moments = gradients * (2 if recipe.optimizer == "adamw" else 0.5)
    written = gradients + (sum(parameters.values()) - count) * stored
    return Sizes(parameters, count, weights, gradients, moments, files, written, gradients + moments)


def kept_as(name: str, learns: bool, recipe: Recipe, device: str) -> torch.dtype:
    """The type of a tensor of floats in a run's memory."""
    low = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if learns or name.endswith((".lora_a", ".lora_b")):
        return torch.float32
    return torch.float32 if device == "cpu" and not name.startswith("decoder.") else low


def _in_few_bits(name: str, parameter: torch.Tensor) -> bool:
    """Whether `quantize_base` takes a frozen tensor."""
    return name.startswith("decoder.blocks.") and parameter.dim() == 2
