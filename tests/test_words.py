"""Names and docstrings of src/pumice: each class name has one meaning, a module's docstring is plain."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pumice"
# Phrases of an older style, in which a docstring listed what a module "knows".
BANNED = ("Knows:", "Does not know")


def repeated_classes(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return each class name that several places define, with those places."""
    definitions = defaultdict(list)
    for label, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                definitions[node.name].append(f"{label}:{node.lineno}")
    return {name: lines for name, lines in definitions.items() if len(lines) > 1}


def banned_docstrings(sources: dict[str, str]) -> list[str]:
    """Return the places whose docstring holds a banned phrase, also where a line break splits it."""
    matches = []
    for label, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = " ".join((ast.get_docstring(node) or "").split())
                if any(phrase in docstring for phrase in BANNED):
                    matches.append(f"{label}: {getattr(node, 'name', 'module')}")
    return matches


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {str(path.relative_to(SOURCE)): path.read_text("utf-8") for path in sorted(SOURCE.rglob("*.py"))}


def test_each_class_name_stands_once(sources: dict[str, str]) -> None:
    assert not repeated_classes(sources)


def test_no_docstring_says_what_a_module_knows(sources: dict[str, str]) -> None:
    assert not banned_docstrings(sources)


def test_both_checks_find_what_they_refuse() -> None:
    sources = {"a.py": '"""Rows. Does not\nknow models."""\nclass A: ...\n', "b.py": "class A: ...\n"}
    assert repeated_classes(sources) == {"A": ["a.py:3", "b.py:1"]}
    assert banned_docstrings(sources) == ["a.py: module"]
