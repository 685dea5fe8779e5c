"""`pumice train`: run or continue the training that a recipe describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def train(
    recipe: Annotated[Path, Argument(help="A recipe, YAML.", metavar="RECIPE.yaml")],
    overrides: Annotated[
        list[str] | None,
        Option("--set", help="Another value for a key of the recipe; repeat as needed.", metavar="KEY=VALUE"),
    ] = None,
) -> None:
    """Train by a recipe. Run it again to go on where it was stopped."""
    from pumice.train import run

    print(f"The model is in {run(recipe, overrides or [])}")
