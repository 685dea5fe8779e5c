"""Another schedule: the connector learns alone first, then the LLM joins it.

    python examples/extend/schedule.py RECIPE [KEY=VALUE ...]

The recipe's `stage.learn` names the connector and other parts. A rate of zero freezes a part, but its
gradients are computed.
"""

from __future__ import annotations

import sys
from typing import Any

from pumice.errors import InputError, WorkError
from pumice.train.loop import Trainer, train
from pumice.train.recipe import Recipe, load_recipe

ALONE = 0.25  # share of the steps in which only the connector learns


class ConnectorFirst(Trainer):
    def __init__(self, recipe: Recipe, *rest: Any) -> None:
        if "connector" not in (learn := recipe.stage.learn) or len(learn) < 2:
            raise InputError(
                f"stage.learn names {', '.join(learn)}; this schedule needs the connector and another part"
            )
        super().__init__(recipe, *rest)

    def rate(self, part: str) -> float:
        if part != "connector" and self.step < ALONE * self.batches.steps:
            return 0.0
        return super().rate(part)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"write: python {sys.argv[0]} RECIPE [KEY=VALUE ...]")
    try:
        print(f"The model is in {train(load_recipe(sys.argv[1], sys.argv[2:]), ConnectorFirst)}")
    except (InputError, WorkError) as error:
        sys.exit(str(error))
