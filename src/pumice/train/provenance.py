"""Where a finished model comes from: digests of what it was made of, versions of what made it.

Knows files and packages. Does not know the run.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

from pumice.files import sha256
from pumice.formats.read import find_model
from pumice.storage.download import WHEELS, locate, weight_files
from pumice.train.recipe import Recipe

PACKAGES = ("pumice", "torch", "numpy", "pillow", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Python, the machine's kind, and the packages that a result depends on."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            continue
    return found


def contents(recipe: Recipe) -> dict[str, str]:
    """Digests of the files that decide a run: its rows, and the model that it starts from."""
    paths = [source.rows for source in recipe.data]
    if isinstance(recipe.model, Path):
        paths += weight_files(find_model(recipe.model))
    else:
        named = (recipe.model.tower, recipe.model.decoder)
        paths += [file for name in named if name not in WHEELS for file in weight_files(locate(name))]
    return {f"contents of {path}": sha256(path) for path in paths}
