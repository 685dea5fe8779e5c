"""Libraries that a recipe may ask for and that need not be installed."""

from __future__ import annotations

import importlib
from typing import Any

from pumice.errors import InputError


def optional(module: str, remedy: str) -> Any:
    """The module of that name. InputError that says `remedy` where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{remedy}, or leave it out") from error
