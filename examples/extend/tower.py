"""A vision tower of another kind: one convolution that turns each patch of pixels into a feature.

    python examples/extend/tower.py weights tower.safetensors
    python examples/extend/tower.py train RECIPE

The first command draws weights for pictures of 64 x 64 pixels and patches of 16. The recipe has, under
`model`: `tower: tower.safetensors`, `vision: {kind: patches, image_size: 64, stride: 16, width: 32}`, and the
rest of a new model. It is the `pumice` command with one more kind. The folder that it writes opens only where
the kind is known, so ask the model through this file as well.
"""

from __future__ import annotations

import sys

from safetensors.torch import save_file
from torch import Tensor, nn

from pumice.cli import main
from pumice.config import VisionConfig
from pumice.model.llava import TOWERS


class Patches(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, config.width, config.stride, config.stride)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels (B, 3, S, S) into features (B, F, width), row by row of the picture."""
        features: Tensor = self.project(pixels)
        return features.flatten(2).transpose(1, 2)


# Its kind, the fields of VisionConfig that it uses, and its class.
TOWERS["patches"] = ("kind image_size width stride", Patches)

if __name__ == "__main__":
    if sys.argv[1:2] == ["weights"]:
        if len(sys.argv) != 3:
            sys.exit(f"write: python {sys.argv[0]} weights FILE.safetensors")
        tower = Patches(VisionConfig("patches", image_size=64, width=32, stride=16))
        save_file(tower.state_dict(), sys.argv[2])
    else:
        sys.exit(main())
