"""Train models in stages; `run` trains one recipe and resumes a stopped run exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def run(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train what a recipe describes, resuming where it stopped; return the finished model's folder.

    overrides: "key=value", dots for nested keys. Raises InputError before any compute when the recipe
    or its data cannot be used, and KeyboardInterrupt after saving when asked to stop.
    """
    from pumice.train.loop import train
    from pumice.train.recipe import load_recipe
    from pumice.train.shapes import check_base

    loaded = load_recipe(recipe, overrides)
    check_base(loaded, recipe)
    return train(loaded)
