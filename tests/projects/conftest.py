"""Scripts of projects/pumice-tiny as modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "projects" / "pumice-tiny"


@pytest.fixture(scope="session")
def script(load_script: Callable[[Path], ModuleType]) -> Callable[[str], ModuleType]:
    """A function that loads a script by its name, as a module of its own."""
    return lambda name: load_script(FOLDER / f"{name}.py")
