"""Who may import whom (see CONTRIBUTING.md, "Layers"): read from the source, nothing is imported.

Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pumice"

# A part is a file or folder of src/pumice. It may import parts of the lines above its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config", "conversation", "files"),
    ("geometry",),
    ("templates", "tokens", "images", "processor", "model"),
    ("weights", "data", "engine"),
    ("answers", "structured"),
    ("assistant",),
    ("train", "serve", "evaluate", "generate", "explain", "doctor"),
    ("cli", "__init__", "__main__"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Neighbours on one line that may be imported all the same.
BESIDE = {
    "tokens": {"templates"},
    "processor": {"templates", "tokens", "images"},  # the only meeting of text and image
    "assistant": {"explain"},  # its method of that name, imported when it is called
    "serve": {"explain"},  # on its page
    "__main__": {"cli"},
}
# Parts that may import less than the lines above allow.
ONLY = {"model": {"config", "errors", "geometry"}}

# Third-party libraries: parts that may use these alone, and libraries that no part may use.
LIBRARIES: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "conversation": set(),
    "files": set(),
    "geometry": set(),
    "model": {"torch"},
}
NEIGHBOURS = {"transformers", "peft", "torchvision", "timm", "vllm", "sglang", "llama_cpp"}


def imported(tree: ast.AST, package: list[str]) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of each import; package is the folder that the file lies in."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from pumice import x` names a part of the package or something of its __init__.
            names = [f"pumice.{a.name}" for a in node.names] if base == "pumice" else [base]
            found += [(node.lineno, name) for name in names]
    return found


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of one file; path is relative to src/pumice."""
    parts = Path(path).with_suffix("").parts
    own = parts[0]
    if own not in LEVEL:
        return [f"{path}: {own} is not in the layer table of tests/test_layers.py"]
    lower = ONLY.get(own, {part for part in LEVEL if LEVEL[part] < LEVEL[own]})
    allowed = lower | BESIDE.get(own, set()) | {own, "__version__"}
    libraries = LIBRARIES.get(own)
    wrong = []
    for line, name in imported(ast.parse(source), ["pumice", *parts[:-1]]):
        top, *rest = name.split(".")
        if top == "pumice":
            part = rest[0] if rest else "__init__"
            if part not in allowed:
                wrong.append(f"{path}:{line}: {own} may not import pumice.{part}")
        elif top in NEIGHBOURS:
            wrong.append(f"{path}:{line}: {top} is a neighbour, not a part of Pumice")
        elif libraries is not None and top not in libraries | sys.stdlib_module_names:
            wrong.append(f"{path}:{line}: {own} may not import {top}")
    return wrong


FILES = sorted(str(p.relative_to(SOURCE).as_posix()) for p in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_imports_only_lower_layers(path: str) -> None:
    assert violations(path, (SOURCE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("conversation.py", "import pumice.images", "conversation may not import pumice.images"),
        ("conversation.py", "import PIL.Image", "conversation may not import PIL"),
        ("images.py", "from pumice.tokens import encode", "images may not import pumice.tokens"),
        ("images.py", "from .tokens import encode", "images may not import pumice.tokens"),
        ("model/llava.py", "def f():\n    from pumice import templates", "may not import pumice.templates"),
        ("model/llava.py", "from .. import conversation", "model may not import pumice.conversation"),
        ("model/vision.py", "import numpy as np", "model may not import numpy"),
        ("engine/run.py", "from pumice.weights.hf import read", "engine may not import pumice.weights"),
        ("train/loop.py", "import pumice", "train may not import pumice.__init__"),
        ("weights/hf.py", "import transformers", "transformers is a neighbour"),
        ("helpers.py", "import os", "helpers is not in the layer table"),
    ],
)
def test_catches(path: str, source: str, message: str) -> None:
    [found] = violations(path, source)
    assert message in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("processor.py", "from pumice import images, templates, tokens"),
        ("model/llava.py", "import torch.nn as nn\nfrom .layers import Norm\nfrom pumice import config"),
        ("weights/save.py", "from pumice import __version__\nimport numpy"),
        ("cli.py", "def ask():\n    from pumice.assistant import load"),
        ("__main__.py", "from pumice.cli import main"),
    ],
)
def test_allows(path: str, source: str) -> None:
    assert violations(path, source) == []
