"""How fast a step was, as a share of what the device could do (model FLOP utilisation, arXiv 2204.02311).

Knows sizes and clocks. Counts the products that a step needs, not what recomputation adds to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from pumice.model.llava import Llava

# Dense bf16 TFLOP/s as the makers state them; devices that are not here are measured.
STATED = {
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "V100": 125, "T4": 65,
    "4090": 165, "3090": 71,
}  # fmt: skip


def flops_per_token(model: Llava, part_of: Callable[[str], str]) -> float:
    """Products, additions counted too, of one token's forward and backward pass through the decoder's blocks.

    Forward 2 a weight; backward 2 for what lies before and 2 where the weight itself learns. Attention is
    left out: it depends on the lengths, and below 2,000 tokens adds some per cent.
    """
    decoder = model.decoder
    blocks = [p for p in decoder.blocks.parameters() if p.dim() == 2]
    learned = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    through = 2 if learned - {"embeddings"} else 0  # gradients must reach the embeddings
    return float(sum(p.numel() * (2 + through + (2 if p.requires_grad else 0)) for p in blocks))


def flops_per_prediction(model: Llava) -> float:
    """The same of one supervised token's projection to the vocabulary."""
    head = model.decoder.head_weight
    return float(head.numel() * (4 + (2 if head.requires_grad else 0)))


def flops_per_square(model: Llava) -> float:
    """The same of one square of pixels through tower and connector; 0 for a tower that is not a ViT."""
    config = model.config.vision
    if config.kind not in ("clip", "siglip"):
        return 0.0
    tower = [p for p in model.tower.parameters() if p.dim() == 2 and p.shape[0] != config.grid**2]
    times = 6 if any(p.requires_grad for p in tower) else 2
    connector = sum(p.numel() * 6 for p in model.connector.parameters() if p.dim() == 2)
    return float(config.grid**2 * (sum(p.numel() for p in tower) * times + connector))


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device: stated by its maker (bf16), or the best of a few matrix products here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, teraflops in STATED.items():
            if known in name:
                return teraflops * 1e12
    size = 4096 if device.type == "cuda" else 1024
    with torch.random.fork_rng(devices=[]):  # a run's own random state is not touched
        one = nn.init.normal_(torch.empty(size, size, device=device, dtype=dtype))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        product = one @ one
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
