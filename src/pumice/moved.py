"""Old names of modules and functions that other people's code may use: each still leads to the new place.

Using one raises a DeprecationWarning that names the new place. Only what the documentation showed is here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGES = {"pumice.generate": "pumice.synth"}  # with all that is in them
MODULES = {
    "pumice.engine.memory": "pumice.kernels.allocator",
    "pumice.engine.prefix": "pumice.engine.cache",
    "pumice.weights.folder": "pumice.formats.pumice.folder",
}
EMPTY = {"pumice.weights"}  # packages of which only the modules above are left
NAMES = {("pumice.explain.page", "explanation_json"): "pumice.serve.explanation"}


def install() -> None:
    """Let `import` find the old names. Once per process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before the finder that would load a second copy of a file


def old_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that some names have left."""

    def get(name: str) -> Any:
        if (module, name) not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place = NAMES[module, name]
        _warn(f"{module}.{name}", f"{place}.{name}")
        return getattr(import_module(place), name)

    return get


def _new_place(name: str) -> str | None:
    for old, new in PACKAGES.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return MODULES.get(name)


def _warn(old: str, new: str) -> None:
    # Python leaves its own import machinery out when it counts to the line that imports.
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=3)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in EMPTY:
            return ModuleSpec(fullname, _Loader(None), is_package=True)
        place = _new_place(fullname)
        if place is None or find_spec(place) is None:
            return None
        _warn(fullname, place)
        return ModuleSpec(fullname, _Loader(place))


class _Loader(Loader):
    """Gives the module of the new place, so that its classes are the same ones."""

    def __init__(self, place: str | None) -> None:
        self.place = place

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if self.place is None:
            return None
        module = import_module(self.place)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if self.place is not None:
            module.__spec__ = self._spec  # which the import system has just replaced by the old name's
