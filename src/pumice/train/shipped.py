"""Find the recipes that Pumice brings, which are named pumice:NAME."""

from __future__ import annotations

import difflib
from pathlib import Path

from pumice.errors import InputError

SHIPPED = "pumice:"  # before the name of a recipe that Pumice brings


def _folder() -> Path:
    """Return the folder of the recipes that Pumice brings: in the package, or beside it in a clone."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent.parent / "recipes"


def _names() -> list[str]:
    folder = _folder()
    return [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml"))]


def near_shipped(name: str) -> list[str]:
    """Return up to three shipped recipes, as pumice:NAME, whose names are like a wrong one."""
    names = _names()
    same_end = [known for known in names if known.rpartition("/")[2] == name.rpartition("/")[2]]
    longer = [known for known in names if len(name) > 2 and name.lower() in known]
    near = same_end or longer or difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    return [f"{SHIPPED}{known}" for known in near[:3]]


def shipped_recipe(name: str, prefix: str) -> Path:
    """Return the path of a recipe named pumice:NAME. prefix: of the InputError where there is none."""
    own_name = name.removeprefix(SHIPPED)
    path = _folder() / f"{own_name}.yaml"
    if not path.is_file():
        near = " or ".join(near_shipped(own_name.removesuffix(".yaml")))
        hint = f"did you mean {near}?" if near else f"it brings {', '.join(_names())}"
        raise InputError(f"{prefix}{name}: Pumice brings no such recipe; {hint}")
    return path
