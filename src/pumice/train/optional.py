"""Optional libraries, imported only when a recipe asks for them."""

from __future__ import annotations

import importlib
from typing import Any

from pumice.errors import InputError


def optional(module: str, remedy: str) -> Any:
    """Import a module. Raises InputError with `remedy` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{remedy}, or leave it out") from error
