"""The kinds of rows. Each file of this folder that has a KIND is one kind."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from functools import cache
from pathlib import Path

from pumice.errors import InputError
from pumice.synth.kinds.base import Kind


@cache
def builtin() -> dict[str, Kind]:
    """Every kind of this folder, by name."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    kinds = [module.KIND for module in modules if hasattr(module, "KIND")]
    return {kind.name: kind for kind in kinds}


def get(name: str) -> Kind:
    """A kind by its name, or from a Python file of yours with a KIND in it. InputError when there is none."""
    if name in builtin():
        return builtin()[name]
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file does
            raise InputError(f"'{path}' cannot be run ({type(error).__name__}: {error}); mend it") from error
        if isinstance(getattr(module, "KIND", None), Kind):
            return module.KIND
        raise InputError(f"'{path}' defines no KIND; see the files of pumice/synth/kinds")
    raise InputError(f"there is no kind '{name}'; use one of {', '.join(builtin())}, or a Python file")
