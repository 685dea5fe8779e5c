"""Another loss: cross-entropy and z-loss, which keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311).

python examples/extend/loss.py RECIPE [KEY=VALUE ...]
"""

from __future__ import annotations

import sys

from torch import Tensor

from pumice.errors import InputError, WorkError
from pumice.train.loop import Trainer, train
from pumice.train.objective import Objective
from pumice.train.recipe import load_recipe

WEIGHT = 1e-4


class WithZLoss(Objective):
    """Adds WEIGHT * log(Z)^2 for each supervised token."""

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        logits = self.model.decoder.logits(hidden).float()  # with the cap of a decoder that has one
        log_z = logits.logsumexp(-1)
        return super().loss(hidden, targets, weights) + WEIGHT * (weights * log_z**2).sum()


class ZLossTrainer(Trainer):
    objective_class = WithZLoss


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"write: python {sys.argv[0]} RECIPE [KEY=VALUE ...]")
    try:
        print(f"The model is in {train(load_recipe(sys.argv[1], sys.argv[2:]), ZLossTrainer)}")
    except (InputError, WorkError) as error:
        sys.exit(str(error))
