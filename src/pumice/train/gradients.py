"""End a run in which a gradient does not reach every parameter that learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pumice.errors import InputError

WATCHED_STEPS = 3  # in which a gradient must reach every parameter that learns


class GradientWatch:
    """Looks for parameters without gradients in the first steps.

    Such a parameter would be saved as it was, after hours, without a word.
    """

    def __init__(self, trainable: Mapping[str, Tensor], part_of: Callable[[str], str]) -> None:
        """part_of: the part of the model that a parameter belongs to, for the message."""
        self._trainable, self._part_of = trainable, part_of
        self._unreached = set(trainable)
        self._steps = 0

    def check(self) -> None:
        """Look at the gradients of a step that shows images. Raises InputError after WATCHED_STEPS steps."""
        if not self._unreached or self._steps == WATCHED_STEPS:
            return
        self._steps += 1
        gradients = {name: self._trainable[name].grad for name in self._unreached}
        reached = {name: gradient.any() for name, gradient in gradients.items() if gradient is not None}
        if reached:  # one wait for all of them, if they are on a GPU
            any_reached = torch.stack([*reached.values()]).tolist()
            self._unreached -= {name for name, one in zip(reached, any_reached, strict=True) if one}
        if self._unreached and self._steps == WATCHED_STEPS:
            name = min(self._unreached)
            raise InputError(
                f"{self._part_of(name)} learns, but in {WATCHED_STEPS} steps no gradient reached {name}: the "
                "loss does not depend on it; use it in the forward pass, or take its part out of stage.learn"
            )
