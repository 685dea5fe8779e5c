"""Pages of the site that no one writes by hand, and links that lead out of docs/.

- The reference: commands from the command line itself, recipe fields from the recipe's classes, modules
  from their docstrings (through mkdocstrings), a page per part of the package.
- Pages that live elsewhere in the repository: the model card, CONTRIBUTING, CHANGELOG, the recipes.
- The notebooks in notebooks/, with the outputs that they are kept with.

In the repository a link to ../src/... or ../CONTRIBUTING.md is right. Here it leads to the page of that file
(of a module, in the reference), or, where there is none, keeps its text only. A link to a file that does
not exist fails the strict build.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import click
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pumice"
_LOG = logging.getLogger("mkdocs.hooks")

# File of the repository -> (page of the site, section of the navigation, title)
ELSEWHERE = {
    "src/pumice/models/pumice-tiny/README.md": ("model-card.md", "How it works", "Model card"),
    "recipes/README.md": ("recipes.md", "How it works", "Recipes"),
    "projects/pumice-tiny/README.md": ("pumice-tiny.md", "How it works", "How pumice-tiny is made"),
    "examples/README.md": ("examples.md", "Project", "Example photographs"),
    "CONTRIBUTING.md": ("contributing.md", "Project", "Contributing"),
    "SECURITY.md": ("reporting.md", "Project", "Report a fault"),
    "CHANGELOG.md": ("changelog.md", "Project", "Changes"),
}
# A module's page of the reference; the fields of recipes have one of their own.
MODULE = re.compile(r"src/pumice/(\w+)(?:/[\w/]+)?\.py")
RECIPE = ("src/pumice/train/recipe.py", "reference/recipe-fields.md")
# Folders that mean more than their code; their own README is the page.
FOLDERS = {"recipes": "recipes/README.md", "projects/pumice-tiny": "projects/pumice-tiny/README.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: notebooks, the reference, and pages from outside docs/."""
    nav: list[Any] = config.nav or []
    sections = {title: part for entry in nav for title, part in entry.items() if isinstance(part, list)}
    for page, section, title in ELSEWHERE.values():
        if section not in sections:
            sections[section] = []
            nav.append({section: sections[section]})
        sections[section].append({title: page})
    notebooks = [{_title(_markdown(path)[0]): f"notebooks/{path.stem}.md"} for path in _notebooks()]
    nav.insert(2, {"Notebooks": notebooks})
    parts = [{f"pumice.{part}": f"reference/{part}.md"} for part in _parts()]
    reference = [
        {"Commands": "reference/commands.md"},
        {"Recipe fields": "reference/recipe-fields.md"},
        {"pumice": "reference/pumice.md"},
        *parts,
    ]
    nav.insert(-1, {"Reference": reference})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for source, (page, *_) in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # the model card's data for hubs
        files.append(File.generated(config, page, content=_relink(text, source, page)))
    for path in _notebooks():
        text, pictures = _markdown(path)
        page = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, page, content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    files.append(File.generated(config, "reference/recipe-fields.md", content=_recipe_fields()))
    names = ["pumice.load", "pumice.Assistant", "pumice.InputError"]
    lines = ["# pumice", "What `import pumice` offers.", *[f"::: {name}" for name in names]]
    files.append(File.generated(config, "reference/pumice.md", content="\n\n".join(lines)))
    for part, modules in _parts().items():
        lines = [f"# pumice.{part}", *[f"::: {module}" for module in modules]]
        files.append(File.generated(config, f"reference/{part}.md", content="\n\n".join(lines)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of docs/ into links to pages."""
    if page.file.generated_by is not None:
        return markdown
    return _relink(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _relink(text: str, source: str, page: str) -> str:
    """Links of a file of the repository as its page needs them. source, page: paths from either root."""

    def change(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        there = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / path)).as_posix()
        if there.startswith("docs/"):
            found = there.removeprefix("docs/")
        else:
            there = FOLDERS.get(there.rstrip("/"), there)
            found = ELSEWHERE[there][0] if there in ELSEWHERE else ""
            if there.startswith("notebooks/") and there.endswith(".ipynb"):
                found = there.removesuffix(".ipynb") + ".md"
            elif module := MODULE.fullmatch(there):
                found = RECIPE[1] if there == RECIPE[0] else f"reference/{module[1]}.md"
            if not (ROOT / there).exists():
                _LOG.warning("%s links to %s, which does not exist", source, there)
        if not found:
            return "" if picture else words
        back = os.path.relpath(found, PurePosixPath(page).parent)
        return f"{picture}[{words}]({back}{hash_}{anchor})"

    pieces = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)  # code stays as it is
    return "".join(piece if piece.startswith("```") else LINK.sub(change, piece) for piece in pieces)


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.M)
    if found is None:
        raise ValueError("a page has no title; begin it with '# '")
    return found[1]


def _parts() -> dict[str, list[str]]:
    """Part of the package -> its public modules, by their dotted names."""
    parts: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names = path.relative_to(PACKAGE).with_suffix("").parts
        if names[0].startswith("__") or names[0] in ("cli", "moved"):
            continue
        dotted = names[:-1] if names[-1] == "__init__" else names
        parts.setdefault(names[0], []).append(".".join(["pumice", *dotted]))
    return parts


def _commands() -> str:
    from pumice.cli import app

    lines = ["# Commands", "As `pumice COMMAND --help` prints them."]

    def add(command: Any, name: str) -> None:
        if hasattr(command, "commands"):
            for child in command.commands.values():
                add(child, f"{name} {child.name}")
            return
        context = click.Context(command, info_name=name)
        usage = command.get_usage(context).removeprefix("Usage: ")
        lines.extend([f"## {name}", command.help or "", f"    {usage}"])
        rows = [row for p in command.params if (row := p.get_help_record(context))]
        # A positional argument's name says it all; its type is the framework's own word.
        names = [re.sub(r"^(\[?[A-Z\[].*) <\S+>$", r"\1", left).replace(" range>", ">") for left, _ in rows]
        table = [f"| `{_cell(n)}` | {_cell(says)} |" for n, (_, says) in zip(names, rows, strict=True)]
        if table:
            lines.append("\n".join(["| argument or option | meaning |", "|---|---|", *table]))

    add(typer.main.get_command(app), "pumice")
    return "\n\n".join(lines)


def _recipe_fields() -> str:
    from pydantic import BaseModel

    from pumice.train import recipe

    lines = ["# Recipe fields", "Every field, as `pumice train` reads it. An unknown one is an error."]
    classes = [c for c in vars(recipe).values() if isinstance(c, type) and issubclass(c, BaseModel)]
    ours = [c for c in classes if c.__module__ == recipe.__name__ and c.model_fields]
    for chosen in sorted(ours, key=lambda c: c is not recipe.Recipe):
        table = ["| field | type | default | meaning |", "|---|---|---|---|"]
        for name, info in chosen.model_fields.items():
            kind = info.annotation if isinstance(info.annotation, type) else str(info.annotation)
            kind = kind.__name__ if isinstance(kind, type) else re.sub(r"[\w.]+\.(?=\w)", "", kind)
            default = "required" if info.is_required() else f"`{_cell(str(info.default))}`"
            table.append(f"| `{name}` | `{_cell(kind)}` | {default} | {_cell(info.description or '')} |")
        lines += [f"## {chosen.__name__}", chosen.__doc__ or "", "\n".join(table)]
    return "\n\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def _markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and the pictures of its outputs by name."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines.append(_relink(source, f"notebooks/{path.name}", f"notebooks/{path.stem}.md"))
            continue
        lines.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            kind = next((kind for kind in ("image/png", "image/jpeg") if kind in data), "")
            if kind:
                name = f"{path.stem}-{len(pictures)}.{kind[6:]}"
                pictures[name] = base64.b64decode(data[kind])
                lines.append(f"![output]({name})")
            else:
                said = "".join(output.get("text", data.get("text/plain", "")))
                said = re.sub(r"\x1b\[[0-9;]*m", "", said)  # colours of a terminal
                lines.append(f"```text\n{said.rstrip()}\n```")
    return "\n\n".join(lines), pictures
