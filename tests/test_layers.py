"""Who may import whom (see CONTRIBUTING.md, "Layers"): read from the source, nothing is imported.

Imports inside functions and under TYPE_CHECKING count like any other. `from pumice import __version__` counts
as none: the package itself is there before any of its parts.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pumice"

# A part is a file or folder of src/pumice. It may import parts of the lines above its own, and itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "moved"),
    ("media", "config_json"),
    ("config", "capability", "conversation", "files", "stopping", "threads"),
    ("geometry", "jsonl", "messages", "png", "kernels"),
    ("boxes", "templates", "images", "model", "webpage", "progress", "storage"),
    ("tokens", "chat_client", "video"),
    ("processor",),
    ("formats", "data", "engine"),
    ("explain",),
    ("assistant",),
    ("train", "serve", "evaluate", "synth"),
    ("cli",),
    ("__init__", "__main__"),
)
# The same inside formats, whose `__init__` imports nothing.
FORMATS: tuple[tuple[str, ...], ...] = (
    ("__init__", "derived"),
    ("names",),
    ("families",),
    ("recognise", "text"),
    ("hf", "efficientnet_lite", "nanovlm"),
    ("gguf", "peft"),
    ("components",),
    ("llava", "pumice"),
    ("read",),
    ("quantize",),
    ("sizes",),
    ("load",),
    ("import_",),
    ("export",),
)
# Parts that may import less than the lines above allow.
ONLY = {"model": {"capability", "config", "errors", "geometry", "kernels"}}

# Third-party libraries: parts that may use these alone, and libraries that no part may use.
LIBRARIES: dict[str, set[str]] = {
    "errors": set(),
    "moved": set(),
    "config": set(),
    "config_json": set(),
    "capability": set(),
    "conversation": set(),
    "files": set(),
    "stopping": set(),
    "threads": set(),
    "geometry": set(),
    "jsonl": set(),
    "messages": set(),
    "kernels": {"torch"},
    "model": {"torch"},
}
# The extra that quantises and compares by llama.cpp itself is loaded in one place.
LLAMA_CPP = "formats/gguf/library.py"
NEIGHBOURS = {"transformers", "peft", "torchvision", "timm", "vllm", "sglang", "llama_cpp"}

Imports = dict[str, set[str]]  # module -> the modules of Pumice that it imports
MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imported(tree: ast.AST, package: list[str], modules: Iterable[str]) -> list[tuple[int, str]]:
    """(line, absolute dotted name of a module) of each import; package: the folder that the file lies in."""
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import x` names a module of the package, or something of its __init__.
            for alias in node.names:
                full_name = f"{base}.{alias.name}"
                if full_name != "pumice.__version__":
                    is_module = full_name in modules or base == "pumice"
                    imports.append((node.lineno, full_name if is_module else base))
    return imports


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of one file; path is relative to src/pumice."""
    parts = Path(path).with_suffix("").parts
    own = parts[0]
    levels = {part: level for level, line in enumerate(LAYERS) for part in line}
    inside = {part: level for level, line in enumerate(FORMATS) for part in line}
    if own not in levels:
        return [f"{path}: {own} is not in the layer table of tests/test_layers.py"]
    if own == "formats" and parts[1] not in inside:
        return [f"{path}: formats/{parts[1]} is not in the layer table of tests/test_layers.py"]
    libraries = LIBRARIES.get(own)
    wrong = []
    for line, name in imported(ast.parse(source), ["pumice", *parts[:-1]], MODULES):
        top, *subparts = name.split(".")
        if top == "pumice":
            part = subparts[0] if subparts else "__init__"
            lower = ONLY.get(own, {other for other in levels if levels[other] < levels[own]})
            if part != own and part not in lower:
                wrong.append(f"{path}:{line}: {own} may not import pumice.{part}")
            if own == part == "formats":
                subpart = subparts[1] if len(subparts) > 1 else "__init__"
                if subpart != parts[1] and inside.get(subpart, len(FORMATS)) >= inside[parts[1]]:
                    wrong.append(f"{path}:{line}: formats/{parts[1]} may not import pumice.formats.{subpart}")
        elif top in NEIGHBOURS and (top, str(path)) != ("llama_cpp", LLAMA_CPP):
            wrong.append(f"{path}:{line}: {top} is a neighbour, not a part of Pumice")
        elif libraries is not None and top not in libraries | sys.stdlib_module_names:
            wrong.append(f"{path}:{line}: {own} may not import {top}")
    return wrong


def graph(modules: Mapping[str, Path]) -> Imports:
    """What each module imports of the others."""
    result: Imports = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        result[module] = {name for _, name in imported(tree, package.split("."), modules)} & set(modules)
        result[module].discard(module)
    return result


def children(imports: Imports, folder: str) -> Imports:
    """The same between what lies in one folder, each of its folders as one; its own `__init__` is a file."""

    def child(module: str) -> str:
        if module == folder:
            return "__init__"
        return module.removeprefix(f"{folder}.").partition(".")[0] if module.startswith(f"{folder}.") else ""

    result: Imports = {}
    for module, others in imports.items():
        if own := child(module):
            result.setdefault(own, set()).update({child(other) for other in others} - {"", own})
    return result


def circle(imports: Imports) -> list[str]:
    """Modules or folders that import each other in a ring; [] when there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        ring: list[str] = error.args[1]
        return ring
    return []


FILES = sorted(str(p.relative_to(SOURCE).as_posix()) for p in SOURCE.rglob("*.py"))
FOLDERS = sorted(module for module, path in MODULES.items() if path.name == "__init__.py")
IMPORTS = graph(MODULES)


@pytest.mark.parametrize("path", FILES)
def test_imports_only_lower_layers(path: str) -> None:
    assert violations(path, (SOURCE / path).read_text(encoding="utf-8")) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert sum(map(len, IMPORTS.values())) > 500  # they were found
    assert circle(IMPORTS) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folders_import_each_other_in_a_circle(folder: str) -> None:
    assert circle(children(IMPORTS, folder)) == []


def test_every_part_has_a_place() -> None:
    file_parts = {Path(path).with_suffix("").parts[0] for path in FILES}
    assert file_parts == {part for line in LAYERS for part in line}
    inside = {Path(path).with_suffix("").parts[1] for path in FILES if path.startswith("formats/")}
    assert inside == {part for line in FORMATS for part in line}


def test_modules_stay_under_450_lines() -> None:
    lengths = {path: len((SOURCE / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length >= 450} == {}


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("conversation.py", "import pumice.images", "conversation may not import pumice.images"),
        ("conversation.py", "import PIL.Image", "conversation may not import PIL"),
        ("images.py", "from pumice.tokens import encode", "images may not import pumice.tokens"),
        ("images.py", "from .tokens import encode", "images may not import pumice.tokens"),
        ("templates.py", "from pumice import images", "templates may not import pumice.images"),
        ("model/llava.py", "def f():\n    from pumice import templates", "may not import pumice.templates"),
        ("model/llava.py", "from .. import conversation", "model may not import pumice.conversation"),
        ("model/vision.py", "import numpy as np", "model may not import numpy"),
        ("kernels/loader.py", "from pumice.model.cache import KVCache", "may not import pumice.model"),
        ("storage/parts.py", "from pumice.model import llava", "storage may not import pumice.model"),
        ("engine/run.py", "from pumice.formats.hf import read", "engine may not import pumice.formats"),
        (
            "explain/page.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pumice.assistant import Assistant",
            "explain may not import pumice.assistant",
        ),
        ("evaluate/run.py", "from pumice import train", "evaluate may not import pumice.train"),
        ("train/loop.py", "import pumice", "train may not import pumice.__init__"),
        ("formats/hf/read.py", "import transformers", "transformers is a neighbour"),
        (
            "formats/text/read.py",
            "from pumice.formats.gguf import file",
            "may not import pumice.formats.gguf",
        ),
        ("formats/hf/read.py", "from .. import efficientnet_lite", "pumice.formats.efficientnet_lite"),
        ("formats/load.py", "def f():\n    import pumice.formats.export", "pumice.formats.export"),
        ("formats/new.py", "import os", "formats/new is not in the layer table"),
        ("helpers.py", "import os", "helpers is not in the layer table"),
    ],
)
def test_catches(path: str, source: str, message: str) -> None:
    [violation] = violations(path, source)
    assert message in violation


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("processor.py", "from pumice import images, templates, tokens"),
        ("model/llava.py", "import torch.nn as nn\nfrom .layers import Norm\nfrom pumice import config"),
        ("formats/pumice/save.py", "from pumice import __version__\nimport numpy"),
        ("formats/gguf/read.py", "from pumice.formats import names\nfrom pumice.formats.gguf import file"),
        ("cli.py", "def ask():\n    from pumice.assistant import load"),
        ("__main__.py", "from pumice.cli import main"),
    ],
)
def test_allows(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_circles_are_seen() -> None:
    modules: Imports = {"p.a.x": {"p.b.y"}, "p.b.y": {"p.c"}, "p.b.z": {"p.a.x"}, "p.c": set()}
    assert circle(modules) == []
    assert set(circle(children(modules, "p"))) == {"a", "b"}  # no module is in a circle, the folders are
    assert set(circle(modules | {"p.c": {"p.a.x"}})) == {"p.a.x", "p.b.y", "p.c"}
