"""Optional libraries, imported only when a recipe asks for them."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from packaging.version import Version

from pumice.errors import InputError, install
from pumice.train.recipe import Recipe

OLDEST_BITSANDBYTES = Version("0.46")  # earlier ones quantise on CUDA alone, and have no operators of torch's


def optional(module: str, remedy: str) -> Any:
    """Import a module. Raises InputError with `remedy` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{remedy}, or leave it out") from error


def check_bitsandbytes(recipe: Recipe) -> None:
    """Raise InputError if the recipe needs bitsandbytes, and it is missing or too old."""
    if recipe.stage.base == "nf4":
        user, remedy = "base: nf4", "base: int8 needs nothing"
    elif recipe.optimizer == "adamw8bit":
        user, remedy = "optimizer: adamw8bit", "optimizer: adamw needs nothing"
    else:
        return
    try:
        installed = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{user} needs bitsandbytes ({install('qlora')}); {remedy}") from error
    if Version(installed) < OLDEST_BITSANDBYTES:
        raise InputError(
            f"{user} needs bitsandbytes {OLDEST_BITSANDBYTES} or later, {installed} is installed "
            f"({install('qlora')} --upgrade); {remedy}"
        )
