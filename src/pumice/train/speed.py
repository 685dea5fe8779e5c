"""Count the FLOPs of a training step, to report its share of the device's peak (MFU, arXiv 2204.02311).

FLOPs count a multiplication and an addition as two. What checkpointing computes again is not counted.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pumice.model.llava import Llava


def flops_per_token(model: Llava, part_of: Callable[[str], str]) -> float:
    """Return the FLOPs of one token's forward and backward pass through the decoder's blocks.

    Forward takes 2 per weight; backward takes 2 for the input's gradient and 2 more where the weight learns.
    The attention scores are left out: they depend on the lengths, and below 2,000 tokens add a few per cent.
    """
    matrices = _matrices(model.decoder.blocks)
    # The end of the last block runs for supervised tokens only; `flops_per_prediction` counts it.
    supervised_only = _matrices(model.decoder.blocks[-1], supervised_only=True)
    input_flops = _input_gradient_flops(model, part_of)
    return _flops(matrices, input_flops) - _flops(supervised_only, input_flops)


def flops_per_prediction(model: Llava, part_of: Callable[[str], str]) -> float:
    """Return the FLOPs of one supervised token from the last block's attention output to its logits."""
    matrices = _matrices(model.decoder.blocks[-1], supervised_only=True)
    block_flops = _flops(matrices, _input_gradient_flops(model, part_of))
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


def _input_gradient_flops(model: Llava, part_of: Callable[[str], str]) -> int:
    """Return the FLOPs per weight for the input's gradient; 0 where at most the embeddings learn."""
    learning = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    return 2 if learning - {"embeddings"} else 0


def flops_per_tile(model: Llava) -> float:
    """Return the FLOPs of one tile through tower and connector; 0 where the tower is not a ViT."""
    config = model.config.vision
    if config.kind not in ("clip", "siglip"):
        return 0.0
    # A matrix with one row per patch holds position embeddings, which are added and not multiplied.
    tower = [p for p in model.tower.parameters() if p.dim() == 2 and p.shape[0] != config.grid**2]
    flops_per_weight = 6 if any(p.requires_grad for p in tower) else 2
    connector = sum(p.numel() * 6 for p in model.connector.parameters() if p.dim() == 2)
    # The connector multiplies the features that are left after its reduction.
    tower_flops = config.grid**2 * sum(p.numel() for p in tower) * flops_per_weight
    return float(tower_flops + model.config.image_tokens * connector)
