"""Old names of modules and functions still work, with a DeprecationWarning that names the new one.

Only names that the documentation has shown are listed.
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

PACKAGES = {"pumice.generate": "pumice.synth"}  # with all their modules
MODULES = {
    "pumice.engine.memory": "pumice.kernels.allocator",
    "pumice.engine.prefix": "pumice.engine.cache",
    "pumice.weights.folder": "pumice.formats.pumice.folder",
}
EMPTY = {"pumice.weights"}  # packages that no longer exist; only their modules above can be imported
NAMES = {("pumice.explain.page", "explanation_json"): "pumice.serve.explanation"}


def install() -> None:
    """Let `import` find the old names. Calling it again does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before the finder that would load a second copy of a file


def old_names(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module from which names have moved away."""

    def get(name: str) -> Any:
        if (module, name) not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_module = NAMES[module, name]
        _warn(f"{module}.{name}", f"{new_module}.{name}")
        return getattr(import_module(new_module), name)

    return get


def _new_module(name: str) -> str | None:
    for old, new in PACKAGES.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return MODULES.get(name)


def _warn(old: str, new: str) -> None:
    # stacklevel 3 is the line that imports: Python does not count its own import machinery.
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=3)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in EMPTY:
            return ModuleSpec(fullname, _Loader(None), is_package=True)
        new_module = _new_module(fullname)
        if new_module is None or find_spec(new_module) is None:
            return None
        _warn(fullname, new_module)
        return ModuleSpec(fullname, _Loader(new_module))


class _Loader(Loader):
    """Return the module under its new name, so that both names share one set of classes."""

    def __init__(self, new_module: str | None) -> None:
        self.new_module = new_module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if self.new_module is None:
            return None
        module = import_module(self.new_module)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if self.new_module is not None:
            module.__spec__ = self._spec  # the import system has just set the old name's
