"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard and Weights & Biases, where asked for.

Knows their packages' interfaces, imported only when a recipe names them. Does not know the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pumice.files import replacing
from pumice.train.optional import optional
from pumice.train.recipe import Recipe


class TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    needs = "torch.utils.tensorboard", "trackers: tensorboard needs its package; pip install 'pumice[track]'"

    def __init__(self, recipe: Recipe) -> None:
        tensorboard = optional(*self.needs)
        self._writer = tensorboard.SummaryWriter(str(recipe.output / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project that WANDB_PROJECT names; going on continues the same run."""

    needs = "wandb", "trackers: wandb needs its package; pip install wandb"

    def __init__(self, recipe: Recipe) -> None:
        wandb = optional(*self.needs)
        memory = recipe.output / "wandb.json"
        known = json.loads(memory.read_text())["id"] if memory.exists() else wandb.util.generate_id()
        with replacing(memory) as file:
            json.dump({"id": known}, file)
        config = json.loads(recipe.model_dump_json())
        self._run: Any = wandb.init(
            name=recipe.name, id=known, resume="allow", config=config, dir=str(recipe.output)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def installed(recipe: Recipe) -> None:
    """InputError where a tracker that the recipe names is not installed."""
    for name in recipe.trackers:
        optional(*TRACKERS[name].needs)
