"""The training objective: the summed loss of one pack, as a module that DDP and FSDP can wrap.

Shapes: T tokens of a pack, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pumice.data.packing import Pack
from pumice.geometry import Layout
from pumice.model.llava import Llava
from pumice.model.packed import PackedAttention, Run
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.loss import supervised_loss


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
        self.model, self.bf16, self.use_all_parts = model, bf16, use_all_parts
        self.features = features  # not a module, so the tower's parameters are not registered twice

    def forward(self, pack: PackTensors, last: bool = False) -> Tensor:
        """Return the summed loss, an fp32 scalar. The caller divides it by the step's supervised tokens.

        last: return the logits (V,) after the pack's last token instead.
        """
        # 1. Move what the loss needs to the device. Pinned memory lets the copies run beside the compute.
        device = self.model.device
        sources, targets, weights = (
            t.to(device, non_blocking=True) for t in (pack.sources, pack.targets, pack.weights)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            if last:
                sources = torch.tensor([len(pack.input_ids) - 1], device=device)
            # 2. Compute hidden states at the supervised positions only: no other token needs logits.
            hidden, zero = self._hidden(pack, sources)
            if last:
                return self.model.decoder.logits(hidden[0])
            # 3. Sum the cross-entropies. `zero` ties the unused parts to the loss and adds nothing to it.
            loss = self.loss(hidden[0], targets, weights)
            return loss if zero is None else loss + zero

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the summed loss of hidden states (S, D) that predict targets (S,); weights (S,).

        A subclass may add terms. Each is a sum over supervised tokens, which the caller divides by their
        number in the whole step.
        """
        head, softcap = self.model.decoder.head_weight, self.model.config.decoder.logit_softcap
        return supervised_loss(hidden, head, targets, weights, softcap)

    def _hidden(self, pack: PackTensors, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the decoder's hidden states at `rows`, and a zero through the connector if one is needed."""
        device = self.model.device
        image_tokens = zero = None
        if pack.images:
            image_tokens = self.model.connect(self.features.encode(pack.images), pack.layouts)
        elif self.use_all_parts and torch.is_grad_enabled():
            # DDP and FSDP wait for a gradient of every trainable part, also from a pack without images.
            zero = self._zero_through_connector()
        hidden = self.model(
            pack.input_ids.to(device, non_blocking=True)[None],
            image_tokens,
            positions=pack.positions.to(device, non_blocking=True)[None],
            attend=PackedAttention(pack.runs, self.model.config.decoder, device),
            rows=rows,
        )
        return hidden, zero

    def _zero_through_connector(self) -> Tensor:
        """Return zero, computed through every trainable part that an image would pass."""
        vision = self.model.config.vision
        if self.features.trains_tower:
            side = vision.image_size
            features = self.model.features(torch.zeros(1, 3, side, side))
        else:
            features = torch.zeros(1, vision.features, vision.width, device=self.model.device)
        zero = self.model.connector(features.to(self._connector_dtype())).sum() * 0
        newline = self.model.image_newline
        return zero.float() if newline is None else zero.float() + newline.sum().float() * 0

    def _connector_dtype(self) -> torch.dtype:
        weight = next(self.model.connector.parameters(), None)
        return torch.float32 if weight is None else weight.dtype
