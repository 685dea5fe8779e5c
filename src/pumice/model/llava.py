"""LLaVA (arXiv 2304.08485, 2310.03744) joins a vision tower, a connector and a decoder.

An image is N placeholders (`IMAGE_TOKEN`) in `input_ids`. `merge` replaces them by the image's N image tokens
and checks both counts. An image is one tile of pixels. With the image policy "anyres" it is several tiles,
and N differs between images: a `Layout` says how.

Shapes: B batch, T tokens, M images, P tiles, S pixels on a side, F features of a tile, C tower width, N image
tokens of a tile, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pumice.capability import Capability, fields
from pumice.config import IMAGE_TOKEN, ModelConfig, VisionConfig
from pumice.errors import check_known, counted
from pumice.geometry import Layout
from pumice.model.adapters import add_lora
from pumice.model.connector import Connector, arrange, average, check_image_tokens
from pumice.model.decoder import Decoder
from pumice.model.efficientnet import EfficientNetLite
from pumice.model.layers import Attend, Causal
from pumice.model.transfer import to_device
from pumice.model.trial import try_shapes
from pumice.model.vision import ViT

# The kinds of towers: the fields that each implements, and its module.
_SIZES = "kind image_size width stride"
_VIT = f"{_SIZES} depth heads mlp_width activation norm_eps layer select"
TOWERS: dict[str, tuple[str, Callable[[VisionConfig], nn.Module]]] = {
    "efficientnet_lite": (f"{_SIZES} variant also_stride", EfficientNetLite),
    "clip": (_VIT, ViT),
    "siglip": (f"{_VIT} final_norm fractional", ViT),
    # A language model alone; `Processor` refuses pictures.
    "none": ("kind width", lambda config: nn.Identity()),
}
_BUILT_IN = dict(TOWERS)  # known to give config.features of config.width


def make_tower(config: VisionConfig) -> nn.Module:
    """Build the vision tower. Raise InputError on an unknown kind, or a field that this kind lacks."""
    check_known(config.kind, TOWERS, f"unknown vision tower {config.kind!r}")
    implemented, module = TOWERS[config.kind]
    Capability(f"a tower of kind {config.kind}", {VisionConfig: fields(implemented)}).check(config)
    return module(config)


def check_shapes(config: ModelConfig) -> None:
    """Raise InputError unless the tower and the connector give as many features and tokens as are counted."""
    vision = config.vision
    side, kind = vision.image_size, vision.kind
    if kind not in _BUILT_IN or TOWERS.get(kind) is not _BUILT_IN[kind]:
        try_shapes(
            f"a tower of kind {kind!r}",
            lambda: make_tower(vision),
            (1, 3, side, side),
            ("features", vision.features, vision.width),
            "the config says",
        )
    check_image_tokens(config)


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
        check_shapes(config)
        # Last: adapters replace layers that have to exist.
        if config.lora is not None:
            add_lora(self.decoder, config.lora)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoder's activations outside autocast."""
        return self.decoder.dtype

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of the weights in memory, and the number of parameters without adapters."""
        nbytes = sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))
        with torch.device("meta"):  # a quantized weight is no parameter, so count those of the config
            whole = Llava(replace(self.config, lora=None))
        return nbytes, sum(parameter.numel() for parameter in whole.parameters())

    def features(self, pixels: Tensor) -> Tensor:
        """Turn pixels (P, 3, S, S) into the tower's features (P, F, C), in the tower's dtype."""
        weight = next(self.tower.parameters())
        # Copy, then convert: a conversion on the way to the device would stop the host.
        return self.tower(to_device(pixels, weight.device).to(weight.dtype))

    def encode(self, pixels: Tensor, layouts: Sequence[Layout] = ()) -> Tensor:
        """Turn pixels (P, 3, S, S) into image tokens, shaped as in `connect`."""
        return self.connect(self.features(pixels), layouts)

    def for_connector(self, features: Tensor) -> Tensor:
        """Return features in the connector's dtype. The tower may have another, or they come from the CPU."""
        weight = next(self.connector.parameters(), None)
        return features if weight is None else features.to(weight.device, weight.dtype)

    def connect(self, features: Tensor, layouts: Sequence[Layout] = ()) -> Tensor:
        """Turn the tower's features (P, F, C) into image tokens (P, N, D), or (total, D) with anyres.

        layouts: of the images, in order; only anyres needs them. Raise ValueError if their number of tiles is
        not P.
        """
        features = self.for_connector(features)
        if self.config.image.mode != "anyres":
            return self.connector(features)
        tiles = [layout.tiles for layout in layouts]
        if sum(tiles) != len(features):
            raise ValueError(f"the tower gave {len(features)} tiles, the layouts have {sum(tiles)}")
        if not layouts:  # the empty result has the right width and dtype
            return self.connector(features).flatten(0, 1)
        if any(layout.average for layout in layouts):  # such frames have fewer features than other images
            parts = zip(features.split(tiles), layouts, strict=True)
            images = [
                self.connector(average(part, layout.average) if layout.average else part)
                for part, layout in parts
            ]
        else:
            images = self.connector(features).split(tiles)
        pairs = zip(images, layouts, strict=True)
        return torch.cat([arrange(image, layout, self.image_newline) for image, layout in pairs])

    def merge(self, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Embed input_ids (B, T) and replace the placeholders by image tokens, in order: (B, T, D).

        image_tokens: (M, N, D), or (total, D) if images differ in size. Raise ValueError unless the
        placeholders are as many. The ids may lie in host memory: then they are counted there, and nothing
        waits for the device.
        """
        placeholders = int((input_ids == IMAGE_TOKEN).sum())
        count = 0 if image_tokens is None else image_tokens.shape[:-1].numel()
        if placeholders != count:
            raise ValueError(
                f"input_ids hold {counted(placeholders, 'image placeholder')}, the pictures "
                f"give {counted(count, 'token')}"
            )
        return self.place(to_device(input_ids, self.device), image_tokens if count else None)

    def place(self, ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """Do what `merge` does with ids on the device, without counting the placeholders."""
        is_placeholder = ids == IMAGE_TOKEN
        # Placeholders have no embedding: look up token 0, which is overwritten below.
        embedded = self.decoder.embed(ids.masked_fill(is_placeholder, 0))
        if image_tokens is None:
            return embedded
        return embedded.masked_scatter(is_placeholder[..., None], image_tokens.to(embedded.dtype))

    def forward(
        self,
        input_ids: Tensor,
        image_tokens: Tensor | None = None,
        positions: Tensor | None = None,
        attend: Attend | None = None,
        out: dict[str, Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run input_ids (B, T) and image tokens (M, N, D) or (total, D). Return hidden states (B, T, D).

        positions: (B, T), 0 to T - 1 by default. attend: causal attention by default. out, rows: as in
        `Decoder`.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=self.device).expand_as(input_ids)
        x = self.merge(input_ids, image_tokens)
        return self.decoder(x, positions, attend or Causal(self.config.decoder), out, rows)
