"""The provenance of a finished model: digests of its input files and versions of the packages."""

from __future__ import annotations

import contextlib
import inspect
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pumice.data.rows import Rows
from pumice.files import sha256
from pumice.formats.read import find_model
from pumice.storage.download import WHEELS, locate, weight_files
from pumice.train.recipe import NewModel, Recipe

CONTENTS = "contents of "  # begins the name of a file's digest
PACKAGES = ("pumice", "torch", "numpy", "pillow", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that a result depends on."""
    packages = {"python": platform.python_version(), "machine": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # not installed: run from a source tree
            packages[name] = metadata.version(name)
    return packages


def content_digests(recipe: Recipe, rows: Sequence[Rows]) -> dict[str, str]:
    """Return digests of the rows and of the weights that a run starts from: SHA-256 of single files."""
    paths = []
    if isinstance(recipe.model, NewModel):
        names = (recipe.model.tower, recipe.model.decoder)
        paths += [file for name in names if name not in WHEELS for file in weight_files(locate(name))]
    elif recipe.base is not None:
        paths += weight_files(find_model(recipe.base))
    return {f"{CONTENTS}{source.label}": source.digest() for source in rows} | {
        f"{CONTENTS}{path}": sha256(path) for path in paths
    }


def is_own(code: type) -> bool:
    """Return whether a class is not Pumice's."""
    return code.__module__.partition(".")[0] != "pumice"


def code_digests(classes: Sequence[type]) -> dict[str, dict[str, str]]:
    """Return, under "code", the SHA-256 of the file of each class that is not Pumice's, by its name.

    Classes without a file, as in an interactive session, are left out; without any, the result is empty.
    """
    digests = {}
    for own in classes:
        if is_own(own):
            with contextlib.suppress(TypeError, OSError):
                digests[own.__name__] = sha256(Path(inspect.getfile(own)))
    return {"code": digests} if digests else {}


def changed_code(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each class whose file is another one than before; both as `code_digests` says."""
    digests = now.get("code", {})
    return [
        f"The file of {name} has changed since this run was saved: its next steps may compute something else."
        for name, digest in before.get("code", {}).items()
        if digests.get(name, digest) != digest
    ]
