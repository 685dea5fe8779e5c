"""Old names of modules and functions still work, with a DeprecationWarning that names the new place.

Only names that the documentation has shown are listed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "pumice.generate": "pumice.synth",  # and the modules in it
    "pumice.engine.memory": "pumice.kernels.allocator",
    "pumice.engine.prefix": "pumice.engine.cache",
    "pumice.weights.folder": "pumice.formats.pumice.folder",
}
NAMES = {"pumice.explain.page.explanation_json": "pumice.serve.explanation.explanation_json"}


def install() -> None:
    """Make the old modules importable. Calling it again does nothing."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldModules())  # first: the usual finder would load a second copy of a file


def old_names(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module from which names have moved away."""

    def get(name: str) -> Any:
        old = f"{module}.{name}"
        if old not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(old, NAMES[old])
        return getattr(import_module(NAMES[old].rpartition(".")[0]), name)

    return get


def _warn(old: str, new: str) -> None:
    # stacklevel 3 is the line that imports: Python does not count its own import machinery.
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=3)


class _OldModules:
    """Imports the new module for an old name, so that both names share one set of classes.

    It has no base class: `importlib.abc` takes as long to import as all else that `import pumice` does.
    """

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "pumice.weights":  # no longer a package: only its module above can be imported
            return ModuleSpec(fullname, None, is_package=True)
        for old, new in MODULES.items():
            if fullname == old or fullname.startswith(f"{old}."):
                from importlib.util import find_spec  # here: `import pumice` stays quick

                new_name = new + fullname.removeprefix(old)
                if new_spec := find_spec(new_name):
                    _warn(fullname, new_name)
                    loader: Any = self
                    return ModuleSpec(fullname, loader, loader_state=new_spec)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return import_module(spec.loader_state.name)

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just set the spec of the old name. Restore the module's own.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
