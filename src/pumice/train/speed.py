"""The products that a step needs, of which the device's peak is a share (MFU, arXiv 2204.02311).

Knows the model's sizes. What recomputation adds is not counted.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pumice.model.llava import Llava


def flops_per_token(model: Llava, part_of: Callable[[str], str]) -> float:
    """Products, additions counted too, of one token's forward and backward pass through the decoder's blocks.

    Forward 2 a weight; backward 2 for what lies before and 2 where the weight itself learns. Attention is
    left out: it depends on the lengths, and below 2,000 tokens adds some per cent.
    """
    every, late = _matrices(model.decoder.blocks), _matrices(model.decoder.blocks[-1], late=True)
    through = _through(model, part_of)
    return _products(every, through) - _products(late, through)


def flops_per_prediction(model: Llava, part_of: Callable[[str], str]) -> float:
    """The same of one supervised token's way to the vocabulary, from the last block's attention on."""
    late = _products(_matrices(model.decoder.blocks[-1], late=True), _through(model, part_of))
    head = model.decoder.head_weight
    return late + float(head.numel() * (4 + (2 if head.requires_grad else 0)))


def _matrices(block: nn.Module, late: bool = False) -> list[nn.Parameter]:
    """late: those that the last block uses at supervised positions alone."""
    named = block.named_parameters()
    return [p for n, p in named if p.dim() == 2 and (not late or n.startswith(("attention.o.", "mlp.")))]


def _products(weights: list[nn.Parameter], through: int) -> float:
    return float(sum(p.numel() * (2 + through + (2 if p.requires_grad else 0)) for p in weights))


def _through(model: Llava, part_of: Callable[[str], str]) -> int:
    """Products a weight for gradients that must reach the embeddings."""
    learned = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    return 2 if learned - {"embeddings"} else 0


def flops_per_tile(model: Llava) -> float:
    """The same of one square of pixels through tower and connector; 0 for a tower that is not a ViT."""
    config = model.config.vision
    if config.kind not in ("clip", "siglip"):
        return 0.0
    tower = [p for p in model.tower.parameters() if p.dim() == 2 and p.shape[0] != config.grid**2]
    times = 6 if any(p.requires_grad for p in tower) else 2
    connector = sum(p.numel() * 6 for p in model.connector.parameters() if p.dim() == 2)
    return float(config.grid**2 * (sum(p.numel() for p in tower) * times + connector))
