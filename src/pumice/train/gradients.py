"""End a run in which a gradient does not reach every parameter that learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from pumice.errors import InputError

WATCHED_STEPS = 3  # of a part, in which a gradient must reach all its parameters


class GradientWatch:
    """Looks for parameters without gradients in the first steps.

    Such a parameter would be saved as it was, after hours, without a word.
    """

    def __init__(self, trainable: Mapping[str, Tensor], part_of: Callable[[str], str]) -> None:
        """part_of: the part of the model that a parameter belongs to, for the message."""
        self._trainable, self._part_of = trainable, part_of
        self._unreached = set(trainable)
        self._steps: Counter[str] = Counter()  # of each part

    def check(self, moving: Collection[str]) -> None:
        """Look at the gradients of a step that shows images. Raises InputError after WATCHED_STEPS steps.

        moving: the parts whose rate is not zero. Steps of the others do not count: at rest, LoRA's B stays
        zero, and so does the gradient of A.
        """
        if not self._unreached:
            return
        self._steps.update(moving)
        gradients = {name: self._trainable[name].grad for name in self._unreached}
        reached = {name: gradient.any() for name, gradient in gradients.items() if gradient is not None}
        if reached:  # one wait for all of them, if they are on a GPU
            any_reached = torch.stack([*reached.values()]).tolist()
            self._unreached -= {name for name, one in zip(reached, any_reached, strict=True) if one}
        if late := [n for n in self._unreached if self._steps[self._part_of(n)] >= WATCHED_STEPS]:
            name = min(late)
            raise InputError(
                f"{self._part_of(name)} learns, but in {WATCHED_STEPS} steps no gradient reached {name}: the "
                "loss does not depend on it; use it in the forward pass, or take its part out of stage.learn"
            )
