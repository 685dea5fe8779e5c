"""Why a run would be doomed, told before its first step.

Knows the recipe, the model's sizes, the rows, the memory and the disk. Changes nothing.
"""

from __future__ import annotations

import shutil

from pumice.errors import InputError
from pumice.formats.load import find_device
from pumice.geometry import picture_layout
from pumice.train.batches import Batches
from pumice.train.devices import GB, total_memory
from pumice.train.recipe import Recipe
from pumice.train.setup import Setup
from pumice.train.shapes import read_parts, with_adapters
from pumice.train.sizes import Sizes, sizes

TRIED = 100  # rows, spread over the first epoch, of which one at least must teach something


def memory(recipe: Recipe, processes: int = 1) -> None:
    """Memory must hold weights, gradients and optimiser. Told before the weights are read.

    What can be told only by running (activations) is `plan`'s to say.
    """
    device = find_device(recipe.device)
    needed = sizes(recipe, with_adapters(recipe, read_parts(recipe).config), device.type).held
    if device.type == "cuda" and recipe.parallel != "ddp":
        needed /= processes  # elsewhere all processes share what there is: at least one copy is in it
    there = total_memory(device)
    if there is not None and needed > there:
        raise InputError(
            f"{recipe.name}: weights, gradients and optimiser take {needed / GB:.1f} GB, {device} has "
            f"{there / GB:.1f} GB; learn fewer parts, use stage.lora with stage.base, or more processes "
            "(`pumice plan` tells)"
        )


def preflight(setup: Setup, batches: Batches) -> None:
    """InputError on the first thing that would make the run useless or break it off."""
    pictures_fit(setup)
    batches.check()
    batches.try_rows(TRIED)
    disk(setup.recipe, sizes(setup.recipe, setup.model.config, setup.device.type))


def pictures_fit(setup: Setup) -> None:
    """A picture's tokens must leave room for text in the context."""
    config = setup.processor.config
    if config.vision.kind == "none":
        return
    sizes = config.image.pinpoints or ((1, 1),)  # without tiles all sizes are alike
    tokens = max(picture_layout(config, size).tokens for size in sizes)
    if tokens >= config.decoder.context:
        raise InputError(
            f"a picture takes {tokens} tokens, a row at most {config.decoder.context}; raise the context, or "
            "give the model fewer or smaller tiles or a connector that reduces"
        )


def disk(recipe: Recipe, found: Sizes) -> None:
    """The disk must take `keep_last` checkpoints, one more while it is written, and the finished model."""
    needed = found.disk(recipe.keep_last)
    written = sum(p.stat().st_size for p in recipe.output.rglob("*") if p.is_file())
    free = shutil.disk_usage(recipe.output).free + written
    if free < needed:
        raise InputError(
            f"{recipe.output} needs {needed / GB:.2f} GB ({recipe.keep_last} + 1 checkpoints of "
            f"{found.checkpoint / GB:.2f} GB and the model), {free / GB:.2f} GB are free there; choose "
            "another disk or a lower keep_last"
        )
