"""The model that the engine's tests run: random, and small enough to answer hundreds of times."""

from __future__ import annotations

import torch

from pumice.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionConfig
from pumice.model.llava import Llava

VOCABULARY, WIDTH = 101, 32


def small_model(
    window: int | None = None,
    context: int = 96,
    stops: tuple[int, ...] = (),
    mlp_width: int = 48,
    depth: int = 3,
    **more: bool,
) -> Llava:
    """more: of DecoderConfig."""
    decoder = DecoderConfig(
        vocab_size=VOCABULARY, width=WIDTH, depth=depth, heads=4, kv_heads=2, head_dim=8, mlp_width=mlp_width,
        context=context, sliding_window=window, **more,
    )  # fmt: skip
    config = ModelConfig(
        decoder=decoder,
        vision=VisionConfig(image_size=64, variant="lite0"),
        connector=ConnectorConfig(kind="linear"),
        stop_token_ids=stops,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Llava(config).eval()
        for parameter in model.decoder.parameters():  # large weights: no two logits are close
            if parameter.dim() == 2:
                parameter.data.normal_(0, 0.3)
    return model
