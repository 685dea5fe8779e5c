"""Tensors that checkpoints store although the config decides them: rotary frequencies, position numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.config import DecoderConfig, VisionConfig
from pumice.errors import InputError
from pumice.model.layers import rope_inv_freq
from pumice.storage.outline import ValuesNotHere
from pumice.storage.tensors import LazyTensor


@dataclass(frozen=True)
class Derived:
    """A tensor that must hold what the config decides. It may be missing.

    allowed: makes the values that it may hold, each (n,). source: what decides them, for errors. rtol, atol:
    how far a value may be from these, as of torch.allclose.
    """

    allowed: Callable[[], Sequence[Tensor]]
    source: str
    rtol: float = 0.0
    atol: float = 0.0

    def check(self, tensor: LazyTensor, label: str) -> None:
        """Raise InputError if the tensor holds anything else. label: names its model in the error.

        A tensor in an outline is checked once it is fetched.
        """
        try:
            stored = tensor.read().flatten()
        except ValuesNotHere:
            return
        # A float type may be too narrow for a whole number.
        dtype = stored.dtype if stored.is_floating_point() else torch.float64
        allowed = [values.to(dtype).double() for values in self.allowed()]
        stored = stored.double()
        right = [values.shape == stored.shape and self._is_close(stored, values).all() for values in allowed]
        if any(right):
            return
        expected = allowed[0]
        if stored.shape != expected.shape:
            difference = f"it holds {len(stored)} values, not {len(expected)}"
        else:
            place = int((~self._is_close(stored, expected)).nonzero()[0])
            difference = f"its value {place} is {stored[place]:g}, not {expected[place]:g}"
        raise InputError(
            f"{label}: {tensor.origin} is not what {self.source} give ({difference}); correct the config, or "
            "remove the tensor"
        )

    def _is_close(self, stored: Tensor, expected: Tensor) -> Tensor:
        return torch.isclose(stored, expected, rtol=self.rtol, atol=self.atol)


def rotary_frequencies(config: DecoderConfig) -> Derived:
    """Return what a tensor `inv_freq` must hold: RoPE's angle per position, (d / 2,)."""
    scaling = config.rope_scaling

    def allowed() -> list[Tensor]:
        # Older code of transformers slowed positions linearly, and stored frequencies that were not slowed.
        stored = [scaling, None] if scaling is not None and scaling.kind == "linear" else [scaling]
        cpu = torch.device("cpu")
        return [rope_inv_freq(config.head_dim, config.rope_theta, one, cpu) for one in stored]

    scaled = f", slowed as {scaling.kind}," if scaling is not None else ""
    source = f"rope_theta {config.rope_theta:g}{scaled} and heads of {config.head_dim} values"
    # They may have been rounded to bf16 or fp16, also where they are stored in a wider type.
    return Derived(allowed, source, rtol=2.0**-8, atol=2.0**-24)


def position_numbers(config: VisionConfig) -> Derived:
    """Return what a tensor `position_ids` of a ViT must hold: 0, 1, 2, ... (positions,)."""
    count = config.grid**2 + (config.kind == "clip")  # a CLIP's class token has a position
    return Derived(lambda: [torch.arange(count)], f"the tower's {count} positions")
