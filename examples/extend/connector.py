"""A connector of another kind: two layers with SiLU between them.

    python examples/extend/connector.py train RECIPE --set model.connector.kind=mlp2x_silu

In the recipe, `model` is a mapping (docs/extending.md), not a name alone.
It is the `pumice` command with one more kind. The folder that it writes opens only where the kind is known,
so ask the model through this file as well.
"""

from __future__ import annotations

import sys

from torch import nn

from pumice.cli import main
from pumice.model.connector import KINDS


def mlp2x_silu(in_width: int, width: int) -> nn.Sequential:
    """in_width: of the (reduced) features. width: of the decoder."""
    return nn.Sequential(nn.Linear(in_width, width), nn.SiLU(), nn.Linear(width, width))


KINDS["mlp2x_silu"] = mlp2x_silu

if __name__ == "__main__":
    sys.exit(main())
