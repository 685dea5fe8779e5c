"""Read YAML files, with errors that name the file and the line."""

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
