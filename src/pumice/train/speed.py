"""Count the FLOPs of a training step, to report its share of the device's peak (MFU, arXiv 2204.02311).

FLOPs count a multiplication and an addition as two. What checkpointing computes again is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from pumice.model.llava import Llava


def flops_per_token(model: Llava, part_of: Callable[[str], str]) -> float:
    """Return the FLOPs of one token's forward and backward pass through the decoder's blocks.

    Forward takes 2 per weight; backward takes 2 for the input's gradient and 2 more where the weight learns.
    The attention scores are left out: they depend on the lengths, and below 2,000 tokens add a few per cent.
    """
    first = _first_with_gradient(model, part_of)
    blocks = enumerate(model.decoder.blocks)
    flops = sum(_flops(_matrices(block), 2 if number >= first else 0) for number, block in blocks)
    # The end of the last block runs for supervised tokens only; `flops_per_prediction` counts it.
    return flops - _last_flops(model, first)


def flops_per_prediction(model: Llava, part_of: Callable[[str], str]) -> float:
    """Return the FLOPs of one supervised token from the last block's attention output to its logits."""
    block_flops = _last_flops(model, _first_with_gradient(model, part_of))
    # The head always passes a gradient to its input, so it takes 4 per weight and 2 more where it learns.
    head = model.decoder.head_weight
    return block_flops + float(head.numel() * (4 + (2 if head.requires_grad else 0)))


def _matrices(block: nn.Module, supervised_only: bool = False) -> list[nn.Parameter]:
    """Return the weight matrices of blocks.

    supervised_only: those alone that the last block applies only at supervised positions.
    """
    named = block.named_parameters()
    return [
        p
        for n, p in named
        if p.dim() == 2 and (not supervised_only or n.startswith(("attention.o.", "mlp.")))
    ]


def _flops(weights: list[nn.Parameter], input_flops: int) -> float:
    return float(sum(p.numel() * (2 + input_flops + (2 if p.requires_grad else 0)) for p in weights))


def _last_flops(model: Llava, first: int) -> float:
    """Return the FLOPs of the end of the last block. first: as `_first_with_gradient` returns it."""
    matrices = _matrices(model.decoder.blocks[-1], supervised_only=True)
    return _flops(matrices, 2 if len(model.decoder.blocks) - 1 >= first else 0)


def _first_with_gradient(model: Llava, part_of: Callable[[str], str]) -> int:
    """Return the first block whose input gets a gradient; the number of blocks where none does.

    All do where a part before the decoder learns. Where at most the embeddings learn, none does.
    """
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    inside = [name for name in learning if name.startswith("decoder.blocks.")]
    if {part_of(name) for name in set(learning) - set(inside)} - {"embeddings"}:
        return 0
    return min(map(_block_number, inside), default=len(model.decoder.blocks))


def flops_per_tile(model: Llava) -> float:
    """Return the FLOPs of one tile through the connector, and through the tower where it is a ViT."""
    config, tower = model.config.vision, 0.0
    if config.kind in ("clip", "siglip"):
        # A matrix with one row per patch holds position embeddings, which are added and not multiplied.
        parameters = model.tower.named_parameters()
        named = [(name, p) for name, p in parameters if p.dim() == 2 and p.shape[0] != config.grid**2]
        # Backward starts at the first block that learns.
        learning = [_block_number(name) for name, p in named if p.requires_grad]
        first = min(learning, default=config.depth)
        per_patch = sum(p.numel() * (6 if _block_number(name) >= first else 2) for name, p in named)
        tower = float(config.grid**2 * per_patch)
    connector = sum(p.numel() * 6 for p in model.connector.parameters() if p.dim() == 2)
    # The connector multiplies the features that are left after its reduction.
    return tower + model.config.image_tokens * connector


def _block_number(name: str) -> int:
    """Return the number in `blocks.3.attention.q.weight`; -1 for what comes before the blocks."""
    block = re.search(r"\bblocks\.(\d+)\.", name)
    return -1 if block is None else int(block[1])
