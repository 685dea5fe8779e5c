"""Read JSON files key by key, with types checked and errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pumice.errors import CAUSE, InputError, finite, shorten, wrong_input
from pumice.jsonl import wrong_json

_T = TypeVar("_T")
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}
_REQUIRED: Any = object()  # instead of a default: the key must be there


def read_text(path: Path, lacking: str = "the folder is not whole") -> str:
    """Read a text file. lacking: for the error message, what it means that the file is missing."""
    with wrong_input(UnicodeDecodeError, f"{path} cannot be read: it is not UTF-8 text"):
        return read_bytes(path, lacking).decode()


def read_bytes(path: Path, lacking: str = "the folder is not whole") -> bytes:
    """Read the bytes of a file. lacking: for the error message, what it means that the file is missing."""
    with (
        wrong_input(OSError, f"{path} cannot be read: {CAUSE}"),
        wrong_input(FileNotFoundError, f"{path} is missing; {lacking}"),
    ):
        return path.read_bytes()


def read_json(path: Path, lacking: str = "the folder is not whole") -> dict[str, Any]:
    """Read a file's JSON object. Raises InputError if the file is missing, or holds something else."""
    text = read_text(path, lacking).removeprefix("\ufeff")  # which editors on Windows write
    with wrong_json(f"{path} is not JSON: {CAUSE}"):
        values = json.loads(text)
    if not isinstance(values, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")


class Keys:
    """The keys of one JSON object. `label` names the object in errors; a null counts as an absent key."""

    def __init__(self, values: Any, label: str, defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{label} should be an object, not {shorten(values)}")
        self.values: dict[str, Any] = values
        self.label = label
        self.defaults = defaults or {}

    @classmethod
    def of(cls, path: Path) -> Keys:
        """Read the keys of a JSON file."""
        return cls(read_json(path), str(path))

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, kind: type[_T], default: Any = _REQUIRED) -> _T:
        """Return the value of `key`, or its default. Raises InputError on another type or without one."""
        value: Any = self.values.get(key)
        if value is None:
            value = self.defaults.get(key) if default is _REQUIRED else default
            if value is None and default is _REQUIRED:
                raise InputError(f"{self.label} lacks the key {key!r}")
            return value
        # JSON writes 1.0 as 1, and Python takes true for a whole number.
        if kind is float and type(value) in (int, float):
            value = finite(value, f"{self.label}: {key}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(
                f"{self.label}: {key} should be {_KINDS.get(kind, kind.__name__)}, not {shorten(value)}"
            )
        return value

    def object(self, key: str) -> Keys:
        """Return the object under `key`; an empty one if it is absent."""
        return Keys(self.values.get(key) or {}, f"{self.label}: {key}")

    def only(self, key: str, allowed: Mapping[Any, _T] | tuple[_T, ...], default: Any, why: str = "") -> _T:
        """Return the value of `key`, which must be one of `allowed`; if that is a mapping, what it maps to.

        why: a reason for the message. Raises InputError on any other value.
        """
        value = self.values.get(key)
        value = self.defaults.get(key, default) if value is None else value
        for choice in allowed:
            # Python says that 1 == True; JSON has two different values.
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return allowed[choice] if isinstance(allowed, Mapping) else choice
        listed = " or ".join(json.dumps(choice) for choice in allowed)
        reason = f" ({why})" if why else ""
        raise InputError(f"{self.label}: {key} is {json.dumps(value)}; only {listed} can be read{reason}")
