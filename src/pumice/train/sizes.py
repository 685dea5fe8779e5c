"""Compute what a stage holds in memory between steps, and what it writes to disk, from shapes alone.

Memory that is in use only during a step is measured in `plan/footprint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pumice.config import ModelConfig
from pumice.model.llava import Llava
from pumice.train.recipe import Recipe
from pumice.train.setup import part_of, trainable_parameters

# Bytes of one weight: four bits, and its share of a scale for 64 weights. Each scale has one byte, and 256
# scales share a float (double quantisation, QLoRA, arXiv 2305.14314).
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64


@dataclass(frozen=True)
class Shards:
    """What FSDP holds in each process beside its share, in bytes."""

    whole: float  # weights that are not sharded: a frozen tower, quantised matrices, buffers
    block: float  # parameters of one decoder block
    block_gradients: float
    root: float  # parameters outside blocks, which stay gathered for the whole step
    root_gradients: float  # of those after the blocks; others come when the blocks' are gone

    @property
    def gathered(self) -> float:
        """Peak bytes of what is gathered and reduced, beside the shards.

        A block's parameters, and those of the next in the buffer that they arrive in; its gradients, and
        those of the block before it in the buffer that leaves (FSDP2's foreach_all_gather, foreach_reduce).
        """
        return self.root + self.root_gradients + 2 * (self.block + self.block_gradients)


@dataclass(frozen=True)
class Sizes:
    """Counts of parameters, and bytes of memory and disk."""

    parameters: dict[str, int]  # part -> count
    learning: int  # how many of them learn
    weights: float  # bytes in memory
    gradients: float  # bytes in memory
    optimizer: float  # bytes in memory
    files: float  # bytes of file pages, of frozen tensors that memory also holds in another type; CPU only
    model: float  # bytes on disk
    checkpoint: float  # bytes on disk
    shards: Shards

    @property
    def model_states(self) -> float:
        """Bytes of weights, gradients and optimiser states together (ZeRO, arXiv 1910.02054)."""
        return self.weights + self.gradients + self.optimizer

    def disk(self, keep_last: int) -> float:
        """Return the bytes of the last checkpoints, one more while it is written, and the finished model."""
        return self.checkpoint * (keep_last + 1) + self.model


def sizes(recipe: Recipe, config: ModelConfig, device: str) -> Sizes:
    """Return the sizes of the recipe's stage on a device of this type ("cpu", "cuda").

    config: the model's, with the stage's new adapters.
    """
    # 1. A model on the meta device has names and shapes, but needs no memory.
    with torch.device("meta"):
        model = Llava(config)
    learn, base = recipe.stage.learn, recipe.stage.base
    learning = trainable_parameters(model, learn)
    parameters: dict[str, int] = {}
    size: float
    weights = files = whole = 0.0
    places = {"block": 0.0, "root": 0.0}
    gradients_of = {"block": 0.0, "root": 0.0}
    stored_bytes = 2 if recipe.precision == "bf16" else 4
    after_blocks = ("decoder.norm.", "decoder.embed." if config.decoder.tied_head else "decoder.head.")
    # 2. Add up the weights in the types in which the run holds them.
    for name, parameter in model.named_parameters():
        numel, part = parameter.numel(), part_of(name, learn)
        parameters[part] = parameters.get(part, 0) + numel
        is_quantized = base != "none" and name not in learning and _is_quantized(name, parameter)
        if is_quantized:
            size = numel * NF4_BYTES if base == "nf4" else numel + 4 * len(parameter)
            whole += size
            # Quantised weights are read from their files once, and once more when the model is saved.
            files += stored_bytes * numel
        else:
            size = numel * memory_dtype(name, name in learning, recipe, device).itemsize
            place = _place(name, recipe.stage.learns("tower"))
            if place == "whole":
                whole += size
            elif place != "other block":
                places[place] += size
                if name in learning and (place == "block" or name.startswith(after_blocks)):
                    gradients_of[place] += 4 * numel
        weights += size
        if name not in learning and (stored_bytes == 2 or is_quantized):
            files += stored_bytes * numel
    for name, buffer in model.named_buffers():
        dtype = memory_dtype(name, False, recipe, device) if buffer.is_floating_point() else buffer.dtype
        weights += buffer.numel() * dtype.itemsize
        whole += buffer.numel() * dtype.itemsize
    # 3. Gradients and moments exist for learning weights alone, in fp32; AdamW keeps two moments of each.
    count = sum(parameter.numel() for parameter in learning.values())
    gradients = 4.0 * count
    moments = gradients * (2 if recipe.optimizer == "adamw" else 0.5)
    written = gradients + (sum(parameters.values()) - count) * stored_bytes
    shards = Shards(whole, places["block"], gradients_of["block"], places["root"], gradients_of["root"])
    return Sizes(parameters, count, weights, gradients, moments, files, written, gradients + moments, shards)


def _place(name: str, trains_tower: bool) -> str:
    """Return where FSDP has a parameter: "whole", "root", "block" for the first block, or "other block"."""
    if name.startswith("tower."):
        return "root" if trains_tower else "whole"
    if not name.startswith("decoder.blocks."):
        return "root"
    return "block" if name.startswith("decoder.blocks.0.") else "other block"


def memory_dtype(name: str, learns: bool, recipe: Recipe, device: str) -> torch.dtype:
    """Return the type in which a run holds a floating-point tensor in memory."""
    low = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if learns or name.endswith((".lora_a", ".lora_b")):
        return torch.float32
    # On a CPU only the decoder may be in bf16; tower and connector stay in fp32.
    return torch.float32 if device == "cpu" and not name.startswith("decoder.") else low


def _is_quantized(name: str, parameter: torch.Tensor) -> bool:
    """Return whether `quantize_base` quantises this frozen tensor."""
    return name.startswith("decoder.blocks.") and parameter.dim() == 2
