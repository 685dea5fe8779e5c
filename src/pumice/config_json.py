"""Write a config dataclass as the JSON values of `config.json`, and build it from them strictly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any

from pumice.errors import InputError, finite, instead_of, shorten

# Fields that have another name in config.json, so that models written by earlier versions stay readable.
STORED_NAMES = {"head_dim": "head_width", "rope_theta": "rope_base"}
_hints = functools.cache(typing.get_type_hints)  # which evaluates all annotations of a class


def later(default: Any, **options: Any) -> Any:
    """Return a field that earlier versions lack: config.json leaves it out where it is the default.

    So earlier versions, which refuse unknown keys, open every folder that they can compute.
    """
    return dataclasses.field(default=default, metadata={"later": True}, **options)


@contextlib.contextmanager
def naming(label: str) -> Iterator[None]:
    """Put `label` before an InputError that lacks it: configs do not know which file they come from."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(label):
            raise
        raise InputError(f"{label}: {error}") from error


def as_stored(config: Any) -> dict[str, Any]:
    """Return a config dataclass as JSON values, recursively, under the names of config.json."""
    values = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if not (spec.metadata.get("later") and value == spec.default):
            stored = as_stored(value) if dataclasses.is_dataclass(value) else value
            values[STORED_NAMES.get(spec.name, spec.name)] = stored
    return values


def from_dict(cls: type, values: Any, location: str) -> Any:
    """Build dataclass `cls` from JSON values under the names of config.json, recursively and strictly.

    `location` names the object in error messages. An unknown key is refused with the nearest known one.
    """
    if not isinstance(values, dict):
        raise InputError(f"{location}: expected an object for {cls.__name__}, found {type(values).__name__}")
    hints = _hints(cls)
    fields = {STORED_NAMES.get(f.name, f.name): f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise InputError(f"{location}: unknown key {shorten(key)}{instead_of(key, fields)}")
    arguments = {}
    for name, spec in fields.items():
        if name in values:
            arguments[spec.name] = _convert(hints[spec.name], values[name], f"{location}: {name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise InputError(f"{location}: the key {name!r} is missing")
    with naming(location):
        return cls(**arguments)


def _convert(hint: Any, value: Any, location: str) -> Any:
    if isinstance(hint, types.UnionType):  # only "X | None" occurs
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, location)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{location}: expected a list, found {value!r}")
        inner, *other_types = typing.get_args(hint)
        if other_types and other_types[0] is not Ellipsis and len(value) != len(other_types) + 1:
            raise InputError(f"{location}: expected {len(other_types) + 1} values, found {len(value)}")
        return tuple(_convert(inner, v, location) for v in value)
    if hint is float and type(value) in (int, float):
        return finite(value, location)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{location}: expected {hint.__name__}, found {shorten(value)}")
    return value
