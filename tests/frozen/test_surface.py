"""What users rely on is as it was: commands and their output, the server's description, names in Python.

A commit that means to change one of these records it again: `python tests/frozen/make.py --only surface`.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest
from stored import OUTPUTS, SURFACE, differences, helps, imports, openapi, output, read, signatures


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal."""
    for name, value in {"COLUMNS": "40", "TERM": "dumb", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert helps() == read(SURFACE / "help.json")


def test_openapi() -> None:
    assert openapi() == read(SURFACE / "openapi.json")


@pytest.mark.parametrize("name", OUTPUTS)
def test_json(work: Path, name: str) -> None:
    assert differences(output(name), read(SURFACE / "json.json")[name]) == []


def test_differences_are_found() -> None:
    then = {"a": [1, 2.0, {"b": "c"}], "d": None}
    assert differences(then, {"a": [1, 2.000001, {"b": "c"}], "d": None}) == []
    assert len(differences(then, {"a": [1, 2.1, {"b": "c"}], "d": None})) == 1
    assert len(differences(then, {"a": [1, 2.0], "d": None})) == 1
    assert len(differences(then, {"a": [1, 2.0, {"b": "c"}]})) == 1


def test_signatures() -> None:
    assert signatures() == read(SURFACE / "signatures.json")


def test_what_was_shown_once_can_be_imported() -> None:
    """Every import that documents, notebooks and examples show, or showed; an old place may warn."""
    missing = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for module, name in [*read(SURFACE / "imports.json"), *imports()]:
            if name and not hasattr(importlib.import_module(module), name):
                missing.append(f"{module}.{name}")
    assert missing == []
