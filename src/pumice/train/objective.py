"""The training objective: the summed loss of one pack, as a module that DDP and FSDP can wrap.

Shapes: T tokens of a pack, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pumice.capability import GEMMA2, LLAMA, ROPE_SCALING, Capability, fields
from pumice.config import DecoderConfig, RopeScaling
from pumice.data.packing import Pack
from pumice.geometry import Layout
from pumice.model.llava import Llava
from pumice.model.packed import PackedAttention, Run
from pumice.model.transfer import numbers_on, to_device
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.loss import supervised_loss

CAPABILITY = Capability(
    "the loss", {DecoderConfig: fields(f"{LLAMA} {GEMMA2}"), RopeScaling: fields(ROPE_SCALING)}
)


@dataclass(frozen=True)
class PackTensors:
    """The tensors of one pack, in host memory."""

    input_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    runs: Sequence[Run]
    sources: Tensor  # (S,), rows of the hidden states
    targets: Tensor  # (S,)
    weights: Tensor  # (S,)
    images: Sequence[ImageInput]
    layouts: Sequence[Layout]

    @property
    def supervised(self) -> float:
        """The number of supervised tokens; a token that several samples share counts once for each."""
        return float(self.weights.sum())

    @classmethod
    def of(cls, pack: Pack, images: Sequence[ImageInput], pin: bool = False) -> PackTensors:
        """Turn a pack's arrays into tensors. pin: use pinned memory, for copies beside the compute."""

        def to_tensor(values: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(values)
            return tensor.pin_memory() if pin else tensor

        arrays = (pack.input_ids, pack.positions, pack.sources, pack.targets, pack.weights)
        ids, positions, sources, targets, weights = map(to_tensor, arrays)
        return cls(ids, positions, pack.runs, sources, targets, weights, images, pack.layouts)

    @classmethod
    def dummy(cls) -> PackTensors:
        """Return a pack without supervised tokens, for a process that has fewer packs than the others."""
        empty = torch.zeros(0, dtype=torch.long)
        two = torch.arange(2)
        return cls(two, two, [Run(2)], empty, empty, torch.zeros(0), (), ())


class Objective(nn.Module):
    """Compute the summed loss of one pack: tower features, connector, decoder, cross-entropy."""

    def __init__(
        self, model: Llava, features: TowerFeatures, bf16: bool, use_all_parts: bool = False
    ) -> None:
        """bf16: compute under autocast. use_all_parts: run the connector even for a pack without images."""
        super().__init__()
        CAPABILITY.check(model.config.decoder)
        self.model, self.bf16, self.use_all_parts = model, bf16, use_all_parts
        self.features = features  # not a module, so the tower's parameters are not registered twice

    def forward(self, pack: PackTensors, last: bool = False) -> Tensor:
        """Return the summed loss, an fp32 scalar. The caller divides it by the step's supervised tokens.

        last: return the logits (V,) after the pack's last token instead.
        """
        # 1. Move what the loss needs to the device, beside the compute.
        device = self.model.device
        sources, targets, weights = (to_device(t, device) for t in (pack.sources, pack.targets, pack.weights))
        with self.autocast():
            if last:
                sources = numbers_on(device, [len(pack.input_ids) - 1])
            # 2. Compute hidden states at the supervised positions only: no other token needs logits.
            hidden = self._hidden(pack, sources)
            if last:
                return self.model.decoder.logits(hidden[0])
            # 3. Sum the cross-entropies.
            return self.loss(hidden[0], targets, weights)

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes: bf16 products, or the weights' own type.

        Without a cache of converted weights: it would keep the whole model in bf16 through the forward pass.
        """
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the summed loss of hidden states (S, D) that predict targets (S,); weights (S,).

        A subclass may add terms. Each is a sum over supervised tokens, which the caller divides by their
        number in the whole step.
        """
        head, softcap = self.model.decoder.head_weight, self.model.config.decoder.logit_softcap
        return supervised_loss(hidden, head, targets, weights, softcap)

    def _hidden(self, pack: PackTensors, rows: Tensor) -> Tensor:
        """Return the decoder's hidden states at `rows`."""
        model, device = self.model, self.model.device
        image_tokens = None
        if pack.images:
            image_tokens = model.connect(self.features.encode(pack.images), pack.layouts)
        x = model.merge(pack.input_ids[None], image_tokens)
        if not pack.images and self.use_all_parts and torch.is_grad_enabled():
            # DDP and FSDP wait for a gradient of every trainable part, also from a pack without images. The
            # zero is part of the embeddings, so that a gradient passes the same blocks as with images.
            x = x + self._zero_through_connector().to(x.dtype)
        attend = PackedAttention(pack.runs, model.config.decoder, device)
        return model.decoder(x, to_device(pack.positions, device)[None], attend, rows=rows)

    def _zero_through_connector(self) -> Tensor:
        """Return zero, computed through every trainable part that an image would pass."""
        vision = self.model.config.vision
        if self.features.trains_tower:
            side = vision.image_size
            features = self.model.features(torch.zeros(1, 3, side, side, device=self.model.device))
        else:
            features = torch.zeros(1, vision.features, vision.width, device=self.model.device)
        zero = self.model.connector(self.model.for_connector(features)).sum() * 0
        newline = self.model.image_newline
        return zero.float() if newline is None else zero.float() + newline.sum().float() * 0
