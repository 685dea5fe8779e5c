"""Send a run's metrics to TensorBoard or Weights & Biases, where the recipe names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pumice.errors import install, wrong_input
from pumice.files import replacing
from pumice.train.recipe import Recipe


class TensorBoard:
    """Write event files in OUTPUT/tensorboard."""

    library, remedy = "torch.utils.tensorboard", install("track")

    def __init__(self, recipe: Recipe) -> None:
        tensorboard = import_module(self.library)
        self._writer = tensorboard.SummaryWriter(str(recipe.output / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Log to one run of the project that WANDB_PROJECT names; a resumed training continues that run."""

    library, remedy = "wandb", "pip install wandb"

    def __init__(self, recipe: Recipe) -> None:
        wandb = import_module(self.library)
        # The id stays in the output folder, so that a resumed training continues its run.
        id_path = recipe.output / "wandb.json"
        run_id = json.loads(id_path.read_text())["id"] if id_path.exists() else wandb.util.generate_id()
        with replacing(id_path) as file:
            json.dump({"id": run_id}, file)
        self._run: Any = wandb.init(
            name=recipe.name, id=run_id, resume="allow", config=recipe.stored(), dir=str(recipe.output)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


WRITTEN = ("tensorboard", "wandb", "wandb.json")  # in the output folder
TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_installed(recipe: Recipe) -> None:
    """Raise InputError where a tracker that the recipe names is not installed."""
    for name in recipe.trackers:
        tracker = TRACKERS[name]
        with wrong_input(
            ImportError, f"trackers: {name} needs its package; {tracker.remedy}, or leave it out"
        ):
            import_module(tracker.library)
