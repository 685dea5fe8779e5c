"""Another schedule: the connector learns alone first, then the LLM joins it.

    python examples/extend/schedule.py RECIPE

Both parts stand in the recipe's `stage.learn`. A rate of zero freezes a part, but its gradients are computed.
"""

from __future__ import annotations

import sys

from pumice.train.loop import Trainer, train
from pumice.train.recipe import load_recipe

ALONE = 0.25  # share of the steps in which only the connector learns


class ConnectorFirst(Trainer):
    def rate(self, part: str) -> float:
        if part != "connector" and self.step < ALONE * self.batches.steps:
            return 0.0
        return super().rate(part)


if __name__ == "__main__":
    train(load_recipe(sys.argv[1], sys.argv[2:]), ConnectorFirst)
