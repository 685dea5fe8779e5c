"""What a step minimises: the summed loss of one pack, as a module that DDP and FSDP can wrap.

Knows the model, tensors of one pack and the tower's features. Does not know rows, files or the optimiser.

Shapes: T tokens of a pack, S supervised predictions.
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
from pumice.model.packed import Packed, Run
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.loss import supervised_loss


@dataclass(frozen=True)
class PackTensors:
    """One pack with everything that its step needs, in host memory."""

    input_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    runs: Sequence[Run]
    sources: Tensor  # (S,), rows of the hidden states
    targets: Tensor  # (S,)
    weights: Tensor  # (S,)
    pictures: Sequence[ImageInput]
    layouts: Sequence[Layout]

    @property
    def supervised(self) -> float:
        return float(self.weights.sum())

    @classmethod
    def of(cls, pack: Pack, pictures: Sequence[ImageInput], pin: bool = False) -> PackTensors:
        """pin: keep the tensors where a GPU can fetch them while it computes."""

        def here(values: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(values)
            return tensor.pin_memory() if pin else tensor

        arrays = (pack.input_ids, pack.positions, pack.sources, pack.targets, pack.weights)
        ids, positions, sources, targets, weights = map(here, arrays)
        return cls(ids, positions, pack.runs, sources, targets, weights, pictures, pack.layouts)

    @classmethod
    def dummy(cls) -> PackTensors:
        """A pack that teaches nothing, for a process that has none left while others still do."""
        nothing = torch.zeros(0, dtype=torch.long)
        two = torch.arange(2)
        return cls(two, two, [Run(2)], nothing, nothing, torch.zeros(0), (), ())


class Objective(nn.Module):
    def __init__(self, model: Llava, features: TowerFeatures, mixed: bool, always: bool = False) -> None:
        """mixed: compute in bfloat16. always: use what learns even where a pack shows no picture."""
        super().__init__()
        self.model, self.mixed, self.always = model, mixed, always
        self.features = features  # no module: its tower is the model's

    def forward(self, work: PackTensors, last: bool = False) -> Tensor:
        """Summed loss, fp32 scalar; divide by the supervised tokens of the whole step.

        last: logits (V,) of what follows the pack instead.
        """
        device = self.model.device
        sources, targets, weights = (
            t.to(device, non_blocking=True) for t in (work.sources, work.targets, work.weights)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed):
            if last:
                sources = torch.tensor([len(work.input_ids) - 1], device=device)
            hidden, unused = self._hidden(work, sources)
            if last:
                return self.model.decoder.logits(hidden[0])
            loss = supervised_loss(hidden[0], self.model.decoder.head_weight, targets, weights)
            return loss if unused is None else loss + unused

    def _hidden(self, work: PackTensors, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        device = self.model.device
        image_tokens = unused = None
        if work.pictures:
            image_tokens = self.model.connect(self.features.look(work.pictures), work.layouts)
        elif self.always and torch.is_grad_enabled():
            unused = self._nothing()
        hidden = self.model(
            work.input_ids.to(device, non_blocking=True)[None],
            image_tokens,
            positions=work.positions.to(device, non_blocking=True)[None],
            attend=Packed(work.runs, self.model.config.decoder.sliding_window, device),
            rows=rows,
        )
        return hidden, unused

    def _nothing(self) -> Tensor:
        """Zero, through every part that a picture would have passed."""
        vision = self.model.config.vision
        if self.features.learns:
            side = vision.image_size
            features = self.model.features(torch.zeros(1, 3, side, side))
        else:
            features = torch.zeros(1, vision.features, vision.width, device=self.model.device)
        zero = self.model.connector(features.to(self._connector_type())).sum() * 0
        newline = self.model.image_newline
        return zero.float() if newline is None else zero.float() + newline.sum().float() * 0

    def _connector_type(self) -> torch.dtype:
        weight = next(self.model.connector.parameters(), None)
        return torch.float32 if weight is None else weight.dtype
