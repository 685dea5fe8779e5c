"""JSON files of others, read key by key with types checked; errors name the file and the key.

Knows JSON. Does not know: what any key means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pumice.errors import InputError

_T = TypeVar("_T")
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}
_NEEDED: Any = object()


def read_text(path: Path, lacking: str = "the folder is not whole") -> str:
    """The file's text. lacking: what it means that the file is missing."""
    try:
        return read_bytes(path, lacking).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_bytes(path: Path, lacking: str = "the folder is not whole") -> bytes:
    """What the file holds. lacking: what it means that the file is missing."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {lacking}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_json(path: Path, lacking: str = "the folder is not whole") -> dict[str, Any]:
    """The file's JSON object. Raises InputError when it is missing, no JSON, or no object."""
    try:
        values = json.loads(read_text(path, lacking))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")


class Keys:
    """The keys of one JSON object. `where` names it in errors; a null counts as absent."""

    def __init__(self, values: Any, where: str, defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where} should be an object, not {values!r}")
        self.values: dict[str, Any] = values
        self.where = where
        self.defaults = defaults or {}

    @classmethod
    def of(cls, path: Path) -> Keys:
        return cls(read_json(path), str(path))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, kind: type[_T], default: Any = _NEEDED) -> _T:
        """The value of `key`, else its default. InputError when it has another type, or neither is there."""
        value: Any = self.values.get(key)
        if value is None:
            value = self.defaults.get(key) if default is _NEEDED else default
            if value is None and default is _NEEDED:
                raise InputError(f"{self.where} lacks the key {key!r}")
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(
                f"{self.where}: {key} should be {_KINDS.get(kind, kind.__name__)}, not {value!r}"
            )
        return value

    def object(self, key: str) -> Keys:
        """The object under `key`; an empty one when it is absent."""
        return Keys(self.values.get(key) or {}, f"{self.where}: {key}")

    def only(self, key: str, allowed: Mapping[Any, _T] | tuple[_T, ...], default: Any, why: str = "") -> _T:
        """The value of `key`, one of `allowed` (of a mapping: what it stands for). InputError else."""
        value = self.values.get(key)
        value = self.defaults.get(key, default) if value is None else value
        for choice in allowed:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return allowed[choice] if isinstance(allowed, Mapping) else choice
        listed = " or ".join(json.dumps(choice) for choice in allowed)
        reason = f" ({why})" if why else ""
        raise InputError(f"{self.where}: {key} is {json.dumps(value)}; only {listed} can be read{reason}")
