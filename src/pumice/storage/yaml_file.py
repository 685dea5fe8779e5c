"""Read YAML files and overrides of their keys, with errors that name the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pumice.errors import InputError, shorten, wrong_input

# Bounds far above what people write. Within them every file is read in a few seconds.
LARGEST_FILE = 1 << 18  # bytes
DEEPEST = 50  # mappings and lists inside each other
MOST_VALUES = 100_000  # with those of an alias counted each time
LARGEST_NUMBER = 1 << 64


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Return the mapping that a YAML file holds. Raises InputError, which calls the file a `what`."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise InputError(
                f"the {what} {path} has more than {LARGEST_FILE >> 10} kB; is it the right file?"
            )
        values = _load(data.decode())
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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose every error is a YAMLError that names the line."""

    levels = 0  # mappings and lists around what is read

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.levels > DEEPEST:  # PyYAML needs some of Python's stack for each
            raise _error(f"more than {DEEPEST} levels of nesting", parent)
        self.levels += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of Python's own types: a 30th of February, an int of 5,000 digits
            value = node.value if isinstance(node, yaml.ScalarNode) else node.tag
            # Python's own words advise to raise its limit of digits.
            reason = "it has too many digits" if "digits" in str(error) else error
            raise _error(f"{shorten(value, 40)} cannot be read: {reason}", node) from error
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise _error("the number is too large", node)
        return value


def _error(problem: str, node: yaml.Node | None) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark if node else None)


def _load(text: str) -> Any:
    """Return the value of a YAML text. Raises YAMLError, also where it exceeds a bound."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})  # before what aliases stand for is built
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return how many values a node stands for, and how many levels. measured: by id; None: not complete."""
    if id(node) in measured:
        size = measured[id(node)]
        if size is None:
            raise _error("an alias stands for what it is a part of", node)
        return size
    measured[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes = [_measure(child, measured) for child in children]
    values, levels = 1 + sum(size for size, _ in sizes), 1 + max((level for _, level in sizes), default=0)
    if values > MOST_VALUES or levels > DEEPEST + 1:
        raise _error(f"more than {MOST_VALUES} values or {DEEPEST} levels, aliases included", node)
    measured[id(node)] = values, levels
    return values, levels


def set_key(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Apply an override "key.inner=value", whose value is YAML; null removes the key. Return its keys."""
    dotted, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"--set {override}: write key=value")
    with wrong_input(yaml.YAMLError, f"--set {override}: the value is not YAML; quote it as in a file"):
        value = _load(text)
    *outer, last = keys = dotted.strip().split(".")
    place: Any = values
    for number, key in enumerate(outer):
        if isinstance(place, list) and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        elif isinstance(place, dict):
            if place.get(key) is None:  # absent, or null: nothing so far
                place[key] = {}
            place = place[key]
        else:
            raise _no_mapping(override, ".".join(outer[:number]), place, key)
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, list):
        where = ".".join(outer)
        raise InputError(f"--set {override}: {where} is a list of {len(place)}; say which, as {where}.0")
    elif not isinstance(place, dict):
        raise _no_mapping(override, ".".join(outer), place, last)
    elif value is None:
        place.pop(last, None)
    else:
        place[last] = value
    return tuple(keys)


def _no_mapping(override: str, where: str, value: object, key: str) -> InputError:
    """Return the error of an override that sets `key` in a value, at `where`, that has no keys."""
    return InputError(
        f"--set {override}: there is no {key!r} to set, as {where} is {shorten(value)} and has no keys; "
        "write it as a mapping in the file"
    )
