"""LLaVA (arXiv 2304.08485, 2310.03744): tower, connector and decoder joined.

Knows tensors and its config; never text or files. A picture stands in `input_ids` as N placeholders
(`IMAGE_TOKEN`), which `merge` replaces by the picture's N image tokens, both counts checked.

Shapes: B batch, T tokens, M pictures, S pixels on a side, G grid side, C tower width, N image
tokens of one picture, D decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pumice.config import IMAGE_TOKEN, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.model.adapters import add_lora
from pumice.model.connector import Connector
from pumice.model.decoder import Decoder
from pumice.model.efficientnet import EfficientNetLite
from pumice.model.layers import Attend, Causal

TOWERS = {"efficientnet_lite": EfficientNetLite}


def make_tower(config: VisionConfig) -> nn.Module:
    if config.kind not in TOWERS:
        raise InputError(f"unknown vision tower {config.kind!r}; use one of {', '.join(TOWERS)}")
    return TOWERS[config.kind](config)


class Llava(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = make_tower(config.vision)
        self.connector = Connector(config.connector, config.vision.width, config.decoder.width)
        self.decoder = Decoder(config.decoder)
        if config.lora is not None:
            add_lora(self.decoder, config.lora)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoder's activations outside autocast."""
        return self.decoder.embed.weight.dtype

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (M, 3, S, S) -> the tower's features (M, G*G, C), in the tower's own type."""
        weight = next(self.tower.parameters())
        return self.tower(pixels.to(weight.device, weight.dtype))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (M, 3, S, S) -> image tokens (M, N, D)."""
        return self.connect(self.features(pixels))

    def connect(self, features: Tensor) -> Tensor:
        """The tower's features (M, G*G, C) -> image tokens (M, N, D)."""
        weight = next(self.connector.parameters(), None)
        return self.connector(features if weight is None else features.to(weight.device, weight.dtype))

    def merge(self, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """input_ids (B, T) and image tokens (M, N, D), in order of appearance -> embeddings (B, T, D).

        Raises ValueError unless the placeholders are exactly M * N.
        """
        here = input_ids == IMAGE_TOKEN
        embedded = self.decoder.embed(input_ids.masked_fill(here, 0))
        wanted, given = int(here.sum()), 0 if image_tokens is None else image_tokens.shape[:2].numel()
        if wanted != given:
            raise ValueError(f"input_ids hold {wanted} image placeholders, the pictures give {given} tokens")
        if image_tokens is None or not given:
            return embedded
        return embedded.masked_scatter(here[..., None], image_tokens.to(embedded.dtype))

    def forward(
        self,
        input_ids: Tensor,
        image_tokens: Tensor | None = None,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        out: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """input_ids (B, T) and image tokens (M, N, D) -> hidden states (B, T, D).

        positions (B, T) default to 0..T-1, `attend` to plain causal attention.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.merge(input_ids, image_tokens)
        if out is not None:
            out["embeddings"] = x
        return self.decoder(x, positions, attend or Causal(self.config.decoder.sliding_window), out)
