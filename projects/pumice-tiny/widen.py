"""Begin a larger pumice-tiny from a smaller one: more pixels and finer features, the same function at first.

    python projects/pumice-tiny/widen.py MODEL TARGET --size 320

The connector gets inputs for the tower's finer features (stride 16), with weights of zero. So it begins with
what it knows of the coarse ones (stride 32), and training teaches it the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from command import run
from torch import Tensor

from pumice.errors import InputError
from pumice.formats.pumice import folder
from pumice.formats.pumice.folder import open_parts
from pumice.formats.read import find_model
from pumice.model.efficientnet import HEAD, fine_channels
from pumice.storage.parts import LoadedParts

FIRST = "connector.layers.0.weight"
FINE = 16  # stride of the finer features


def widen_weight(weight: Tensor, width: int, wider: int) -> Tensor:
    """Insert zeros after each of the P joined features: (D, P * width) -> (D, P * wider)."""
    return F.pad(weight.unflatten(1, (-1, width)), (0, wider - width)).flatten(1)


def widen(source: LoadedParts, size: int) -> LoadedParts:
    """The model with pictures of `size` pixels on a side and finer features. Raises InputError."""
    vision = source.config.vision
    if vision is None or vision.kind != "efficientnet_lite" or vision.also_stride:
        raise InputError("the model needs an EfficientNet-Lite tower without finer features")
    if FIRST not in source.state:
        raise InputError(f"the connector '{source.config.connector.kind}' has no layer that could be widened")
    wider = HEAD + fine_channels(vision.variant, FINE) * (vision.stride // FINE) ** 2
    vision = dataclasses.replace(vision, image_size=size, width=wider, also_stride=FINE)
    state = {name: stored.read(torch.float32) for name, stored in source.state.items()}
    state[FIRST] = widen_weight(state[FIRST], HEAD, wider)
    return dataclasses.replace(source, config=dataclasses.replace(source.config, vision=vision), state=state)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a built-in model or a model folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--size", type=int, default=320, help="pixels on a side that the tower sees")
    arguments = parser.parse_args()
    wide = widen(open_parts(find_model(arguments.model)), arguments.size)
    folder.save(arguments.target, wide.config, wide.state, provenance=wide.provenance, parts=wide.parts)


if __name__ == "__main__":
    run(main)
