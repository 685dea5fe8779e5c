"""The kinds of rows. Each YAML file of this folder is one kind: prompt, limits, checks, worked examples."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

from pumice.errors import InputError
from pumice.storage.yaml_file import read_yaml
from pumice.synth.kinds import checks
from pumice.synth.kinds.base import MARKET, SNOW, Example, Kind, pairs, whole


@cache
def builtin() -> dict[str, Kind]:
    """Every kind of this folder, by name."""
    kinds = [_read(path) for path in sorted(Path(__file__).parent.glob("*.yaml"))]
    return {kind.name: kind for kind in kinds}


def _read(path: Path) -> Kind:
    values: dict[str, Any] = read_yaml(path, "kind")
    examples, questions = values.pop("examples"), values.pop("questions", None)
    further = tuple(getattr(checks, name) for name in values.pop("checks", ()))
    limits: dict[str, Any] = {name: tuple(values.pop(name)) for name in ("turns", "words") if name in values}
    return Kind(
        **values,
        **limits,
        checks=further,
        examples=(Example(MARKET, examples["market"]), Example(SNOW, examples["snow"])),
        parse=whole(questions) if questions else pairs,
    )


def get(name: str) -> Kind:
    """A kind by its name, or from a Python file of yours with a KIND in it. InputError when there is none."""
    if name in builtin():
        return builtin()[name]
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        try:
            kind = runpy.run_path(name).get("KIND")
        except Exception as error:  # whatever the file does
            raise InputError(f"'{path}' cannot be run ({type(error).__name__}: {error}); mend it") from error
        if isinstance(kind, Kind):
            return kind
        raise InputError(f"'{path}' defines no KIND; assign it a pumice.synth.kinds.base.Kind")
    raise InputError(f"there is no kind '{name}'; use one of {', '.join(builtin())}, or a Python file")
