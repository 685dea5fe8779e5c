"""Pumice: LLaVA, light. `pumice.load("pumice-tiny").ask("photo.jpg", "What is happening?")`

Importing this package imports neither torch nor any other heavy library; `load` and `Assistant`
come from `pumice.assistant` when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pumice.errors import InputError
from pumice.moved import install as _find_old_names
from pumice.threads import wait_asleep

if TYPE_CHECKING:
    from pumice.assistant import Assistant, load

__version__ = "0.1.0"
__all__ = ["Assistant", "InputError", "__version__", "load"]

_find_old_names()


def __getattr__(name: str) -> Any:
    if name in ("Assistant", "load"):
        if "pumice.assistant" not in sys.modules:
            wait_asleep()
        return getattr(import_module("pumice.assistant"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
