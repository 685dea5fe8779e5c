"""Scripts of projects/pumice-tiny, and the modules of its rows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "projects" / "pumice-tiny"


@pytest.fixture(scope="session")
def script(load_script: Callable[[Path], ModuleType]) -> Callable[[str], ModuleType]:
    """A function that loads a script by its name, as a module of its own."""
    return lambda name: load_script(FOLDER / f"{name}.py")


MODULES = (
    *("attributes", "base", "boxes", "captions", "coco", "composites", "crops", "flickr", "follow_up"),
    *("grammar", "labels", "mentions", "nouns", "objects", "presence", "refusal", "scene_rows", "text_only"),
    "vqa",
)


@pytest.fixture(scope="session")
def rows() -> Any:
    """The recipe's modules by name; its folder is on the path only while they are imported."""
    sys.path.insert(0, str(FOLDER))
    try:
        modules = {name: importlib.import_module(f"rows.{name}") for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
    return SimpleNamespace(**modules)


@pytest.fixture(scope="session")
def build(rows: Any, script: Callable[[str], ModuleType]) -> ModuleType:
    return script("build")
