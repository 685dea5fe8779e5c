"""LLaVA (arXiv 2304.08485, 2310.03744): tower, connector and decoder joined.

Knows tensors and its config; never text or files. A picture stands in `input_ids` as N placeholders
(`IMAGE_TOKEN`), which `merge` replaces by the picture's N image tokens, both counts checked.

A picture is one square of pixels; under the image policy "anyres" it is several, and N differs from
picture to picture: a `Layout` says how.

Shapes: B batch, T tokens, M pictures, P squares, S pixels on a side, F features of a square, C tower
width, N image tokens of a square, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pumice.config import IMAGE_TOKEN, ModelConfig, VisionConfig
from pumice.errors import InputError
from pumice.geometry import Layout
from pumice.model.adapters import add_lora
from pumice.model.connector import Connector, arrange
from pumice.model.decoder import Decoder
from pumice.model.efficientnet import EfficientNetLite
from pumice.model.layers import Attend, Causal
from pumice.model.vision import ViT

TOWERS: dict[str, Callable[[VisionConfig], nn.Module]] = {
    "efficientnet_lite": EfficientNetLite,
    "clip": ViT,
    "siglip": ViT,
    "none": lambda config: nn.Identity(),  # a language model alone; `Processor` refuses pictures
}


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
        self.image_newline: nn.Parameter | None = None
        if config.has_newline:
            newline = torch.empty(config.decoder.width)
            if not newline.is_meta:
                nn.init.normal_(newline, std=config.decoder.width**-0.5)
            self.image_newline = nn.Parameter(newline)
        if config.lora is not None:
            add_lora(self.decoder, config.lora)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoder's activations outside autocast."""
        return self.decoder.dtype

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (P, 3, S, S) -> the tower's features (P, F, C), in the tower's own type."""
        weight = next(self.tower.parameters())
        return self.tower(pixels.to(weight.device, weight.dtype))

    def encode(self, pixels: Tensor, layouts: Sequence[Layout] = ()) -> Tensor:
        """Pixels (P, 3, S, S) -> image tokens, as `connect` gives them."""
        return self.connect(self.features(pixels), layouts)

    def connect(self, features: Tensor, layouts: Sequence[Layout] = ()) -> Tensor:
        """The tower's features (P, F, C) -> image tokens (M, N, D); under anyres (total, D).

        layouts: of the pictures, in order; only anyres looks at them. Raises ValueError when they speak
        of another number of squares.
        """
        weight = next(self.connector.parameters(), None)
        tokens = self.connector(features if weight is None else features.to(weight.device, weight.dtype))
        if self.config.image.mode != "anyres":
            return tokens
        tiles = [layout.tiles for layout in layouts]
        if sum(tiles) != len(tokens):
            raise ValueError(f"the tower saw {len(tokens)} squares, the layouts speak of {sum(tiles)}")
        pictures = zip(tokens.split(tiles), layouts, strict=True)
        arranged = [arrange(picture, layout, self.image_newline) for picture, layout in pictures]
        return torch.cat([tokens[:0].flatten(0, 1), *arranged])

    def merge(self, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """input_ids (B, T) and image tokens, in order of appearance -> embeddings (B, T, D).

        image_tokens: (M, N, D), or (total, D) of pictures that differ. Raises ValueError unless there are
        exactly as many placeholders.
        """
        here = input_ids == IMAGE_TOKEN
        embedded = self.decoder.embed(input_ids.masked_fill(here, 0))
        wanted, given = int(here.sum()), 0 if image_tokens is None else image_tokens.shape[:-1].numel()
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
        rows: Tensor | None = None,
    ) -> Tensor:
        """input_ids (B, T) and image tokens (M, N, D) or (total, D) -> hidden states (B, T, D).

        positions (B, T) default to 0..T-1, `attend` to plain causal attention; out and rows as in `Decoder`.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.merge(input_ids, image_tokens)
        if out is not None:
            out["embeddings"] = x
        return self.decoder(x, positions, attend or Causal(self.config.decoder.sliding_window), out, rows)
