"""Words of src/pumice: each class name has one meaning, docstrings are plain, one of a thing is no plural."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from pumice.errors import counted

SOURCE = Path(__file__).parent.parent / "src" / "pumice"
# Phrases of an older style, in which a docstring listed what a module "knows".
BANNED = ("Knows:", "Does not know")
# What follows a number in a message and may be one.
PLURAL = re.compile(" (rows|questions|answers|pictures|lines|requests|annotations|captions|boxes|frames)\\b")


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


def shares_without_singular(sources: dict[str, str]) -> list[str]:
    """Return the places of texts like f"{x} of {y} rows", which `counted` writes for one as well."""
    matches = []
    for label, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            texts = [str(part.value) if isinstance(part, ast.Constant) else "" for part in parts]
            for before, total, after in zip(texts, texts[1:], texts[2:], strict=False):
                if before.endswith(" of ") and not total and PLURAL.match(after):
                    matches.append(f"{label}:{node.lineno}")
    return matches


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {str(path.relative_to(SOURCE)): path.read_text("utf-8") for path in sorted(SOURCE.rglob("*.py"))}


def test_each_class_name_stands_once(sources: dict[str, str]) -> None:
    assert not repeated_classes(sources)


def test_no_docstring_says_what_a_module_knows(sources: dict[str, str]) -> None:
    assert not banned_docstrings(sources)


def test_no_message_says_one_of_a_thing_in_the_plural(sources: dict[str, str]) -> None:
    assert not shares_without_singular(sources)


@pytest.mark.parametrize(
    ("number", "total", "text"),
    [
        (1, 1, "1 of 1 picture is missing"),
        (1, 3, "1 of 3 pictures is missing"),
        (2, 3, "2 of 3 pictures are missing"),
        (0, 1, "0 of 1 picture are missing"),
        (1, None, "1 picture is missing"),
        (2, None, "2 pictures are missing"),
    ],
)
def test_the_noun_is_of_all_and_the_verb_of_those_counted(number: int, total: int | None, text: str) -> None:
    assert counted(number, "picture", "are missing", of=total) == text


def test_all_checks_find_what_they_refuse() -> None:
    shares = {"c.py": 'f"{a} of {b} rows"\nf"{a} of {counted(b)} first"\nf"{a} of {b.c} lines are bad"\n'}
    assert shares_without_singular(shares) == ["c.py:1", "c.py:3"]
    sources = {"a.py": '"""Rows. Does not\nknow models."""\nclass A: ...\n', "b.py": "class A: ...\n"}
    assert repeated_classes(sources) == {"A": ["a.py:3", "b.py:1"]}
    assert banned_docstrings(sources) == ["a.py: module"]
