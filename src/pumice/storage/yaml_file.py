"""Read YAML files and overrides of their keys, with errors that name the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pumice.errors import InputError


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises InputError, which calls the file a `what`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}{line}: this is not YAML ({problem}); correct the line") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no {what}; it must be a mapping of keys to values")
    return values


def set_key(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Apply an override "key.inner=value", whose value is YAML; null removes the key. Return its keys."""
    dotted, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"--set {override}: write key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not YAML; quote it as in a file") from error
    *outer, last = keys = dotted.strip().split(".")
    place: Any = values
    for key in outer:
        if isinstance(place, list) and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, dict):
            if place.get(key) is None:  # absent, or null: nothing so far
                place[key] = {}
            place = place[key]
        else:
            raise InputError(f"--set {override}: there is no {key!r} to set something in")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif not isinstance(place, dict):
        raise InputError(f"--set {override}: there is no {last!r} to set")
    elif value is None:
        place.pop(last, None)
    else:
        place[last] = value
    return tuple(keys)
