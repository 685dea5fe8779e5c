"""Checks before the first step: memory, context, rows and disk must suffice for the run."""

from __future__ import annotations

import importlib.metadata
import shutil

import torch
from packaging.version import Version

from pumice.errors import InputError, counted, install, wrong_input
from pumice.files import folder_size
from pumice.formats.load import check_bf16
from pumice.geometry import image_layout
from pumice.storage.memory import GB
from pumice.train.batches import Batches
from pumice.train.devices import total_memory
from pumice.train.parallel import World
from pumice.train.recipe import Recipe
from pumice.train.setup import Setup
from pumice.train.shapes import read_parts, with_adapters
from pumice.train.sizes import Sizes, sizes

TRIED_ROWS = 100  # rows of the first epoch; at least one must have supervised tokens
OLDEST_BITSANDBYTES = Version("0.46")  # earlier ones quantise on CUDA alone, and have no operators of torch's


def check_device(recipe: Recipe, device: torch.device, world: World) -> None:
    """Raise InputError when the device cannot run the recipe; reads no weights. It also chooses `world.kind`.

    Memory must hold weights, gradients and optimiser states. `plan` estimates the activations beside them.
    """
    check_bitsandbytes(recipe)
    if recipe.precision == "bf16":
        check_bf16(device, "use precision: fp32")
    needed = sizes(recipe, with_adapters(recipe, read_parts(recipe).config), device.type).model_states
    world.choose_kind(recipe, needed, device)
    if world.kind == "fsdp" and device.type == "cuda":
        needed /= world.size  # on a CPU all processes share one memory, which must hold at least one copy
    available = total_memory(device)
    if available is not None and needed > available:
        raise InputError(
            f"{recipe.name}: weights, gradients and optimiser take {needed / GB:.1f} GB, {device} has "
            f"{available / GB:.1f} GB; learn fewer parts, use stage.lora with stage.base, or more processes "
            "(`pumice plan` shows what fits)"
        )


def preflight(setup: Setup, batches: Batches) -> list[str]:
    """Return notes on what is odd. Raise InputError for what would make the run fail or useless."""
    recipe = setup.recipe
    check_image_tokens(setup)
    batches.check()
    fewest = batches.try_rows(TRIED_ROWS)
    check_disk(recipe, sizes(recipe, setup.model.config, setup.device.type))
    notes = []
    if recipe.batch > batches.pictures:
        pictures = counted(batches.pictures, "picture")
        notes.append(f"batch: {recipe.batch} is more than the {pictures} of an epoch, which is one step")
    if recipe.pack_tokens < fewest:
        notes.append(
            f"pack_tokens: {recipe.pack_tokens} is too few for any row that was tried ({fewest} or more): "
            "each is a pack of its own"
        )
    return notes


def check_bitsandbytes(recipe: Recipe) -> None:
    """Raise InputError if the recipe needs bitsandbytes, and it is missing or too old."""
    if recipe.stage.base == "nf4":
        user, remedy = "base: nf4", "base: int8 needs nothing"
    elif recipe.optimizer == "adamw8bit":
        user, remedy = "optimizer: adamw8bit", "optimizer: adamw needs nothing"
    else:
        return
    missing = f"{user} needs bitsandbytes ({install('qlora')}); {remedy}"
    with wrong_input(importlib.metadata.PackageNotFoundError, missing):
        installed = importlib.metadata.version("bitsandbytes")
    if Version(installed) < OLDEST_BITSANDBYTES:
        raise InputError(
            f"{user} needs bitsandbytes {OLDEST_BITSANDBYTES} or later, {installed} is installed "
            f"({install('qlora')} --upgrade); {remedy}"
        )


def check_image_tokens(setup: Setup) -> None:
    """Raise InputError when one image fills the context and leaves no room for text."""
    config = setup.processor.config
    if config.vision.kind == "none":
        return
    sizes = config.image.pinpoints or ((1, 1),)  # without tiles every size takes the same tokens
    tokens = max(image_layout(config, size).tokens for size in sizes)
    if tokens >= config.decoder.context:
        raise InputError(
            f"a picture takes {tokens} tokens, a row at most {config.decoder.context}; raise the context, or "
            "give the model fewer or smaller tiles or a connector that reduces"
        )


def check_disk(recipe: Recipe, stage_sizes: Sizes) -> None:
    """Raise InputError when the disk cannot hold the run.

    It needs room for `keep_last` checkpoints, one more while it is written, and the finished model.
    """
    needed = stage_sizes.disk(recipe.keep_last)
    # A resumed run replaces its own old files, so their space counts as free.
    free = shutil.disk_usage(recipe.output).free + folder_size(recipe.output)
    if free < needed:
        raise InputError(
            f"{recipe.output} needs {needed / GB:.2f} GB ({recipe.keep_last} + 1 checkpoints of "
            f"{stage_sizes.checkpoint / GB:.2f} GB and the model), {free / GB:.2f} GB are free there; choose "
            "another disk or a lower keep_last"
        )
