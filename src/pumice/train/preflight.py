"""Why a run would be doomed, told before its first step.

Knows the recipe, the model's sizes, the rows and the disk. Changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from torch import Tensor

from pumice.errors import InputError
from pumice.geometry import tile_layout
from pumice.train.batches import Batches
from pumice.train.setup import Setup

TRIED = 100  # rows, spread over the first epoch, of which one at least must teach something


def preflight(setup: Setup, batches: Batches, learned: Mapping[str, Tensor]) -> None:
    """InputError on the first thing that would make the run useless or break it off."""
    pictures_fit(setup)
    batches.check()
    batches.try_rows(TRIED)
    room(setup, learned)


def pictures_fit(setup: Setup) -> None:
    """A picture's tokens must leave room for text in the context."""
    config = setup.processor.config
    if config.vision.kind == "none":
        return
    tokens = config.image_tokens
    if config.image.mode == "anyres":
        tokens = max(tile_layout(config, size).tokens for size in config.image.pinpoints)
    if tokens >= config.decoder.context:
        raise InputError(
            f"a picture takes {tokens} tokens, a row at most {config.decoder.context}; raise the context, or "
            "give the model fewer or smaller tiles or a connector that reduces"
        )


def room(setup: Setup, learned: Mapping[str, Tensor]) -> None:
    """The disk must take `keep_last` checkpoints, one more while it is written, and the finished model."""
    recipe = setup.recipe
    states = 2 if recipe.optimizer == "adamw8bit" else 8  # bytes a weight: two moments
    point = sum(p.numel() * (p.element_size() + states) for p in learned.values())
    model = sum(p.numel() * p.element_size() for p in setup.model.parameters())
    needed = point * (recipe.keep_last + 1) + model
    written = sum(p.stat().st_size for p in recipe.output.rglob("*") if p.is_file())
    free = shutil.disk_usage(recipe.output).free + written
    if free < needed:
        raise InputError(
            f"{recipe.output} needs {needed / 1e9:.2f} GB ({recipe.keep_last} + 1 checkpoints of "
            f"{point / 1e9:.2f} GB and the model), {free / 1e9:.2f} GB are free there; choose another disk "
            "or a lower keep_last"
        )
