"""Python, torch, the libraries that Pumice requires, and its extras. Reads metadata; imports torch alone."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

from pumice import __version__
from pumice.cli.checks.finding import Finding


def versions() -> list[Finding]:
    """Python, torch, the libraries that Pumice requires, and which extras are complete."""
    found = [Finding("pumice", f"{__version__} in {Path(__file__).parents[1]}", value=__version__)]
    place = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    found.append(Finding("python", place, value=platform.python_version()))
    found.append(_torch())
    try:
        wanted = importlib.metadata.requires("pumice") or []
    except importlib.metadata.PackageNotFoundError:
        remedy = "install it with pip, so that the versions of its libraries can be checked"
        return [*found, Finding("libraries", "this Pumice was not installed by pip", "note", remedy)]
    return found + _libraries(wanted)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken library fails in many ways, and each of them is a finding
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding("torch", f"cannot be imported ({said})", "problem", "run `pip install -U torch`")
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Finding("torch", f"{torch.__version__}, {kind}", value=torch.__version__)


def _libraries(wanted: list[str]) -> list[Finding]:
    """wanted: requirements as a package's metadata has them, extras by their markers."""
    from packaging.requirements import Requirement

    found: list[Finding] = []
    extras: dict[str, list[str]] = {}  # what each lacks
    seen: dict[str, str] = {}
    for line in wanted:
        requirement = Requirement(line)
        named = re.search(r"extra == ['\"]([\w.-]+)['\"]", line)
        extra = named[1] if named else ""
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if extra:
            extras.setdefault(extra, [])
        if requirement.name == "pumice":
            continue
        version = _version(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            if not extra:
                seen[requirement.name] = version
            continue
        text = f"{requirement.name}{requirement.specifier}"
        if extra:
            extras[extra].append(text if version is None else f"{text} (found {version})")
        elif version is None:
            remedy = f"run `pip install '{text}'`"
            found.append(Finding(requirement.name, "is not installed", "problem", remedy))
        else:
            remedy = f"run `pip install -U '{text}'`"
            found.append(Finding(requirement.name, f"{version} is not {text}", "problem", remedy))
    said = ", ".join(f"{name} {version}" for name, version in seen.items() if name != "torch")
    found.insert(0, Finding("libraries", said, value=seen))
    for extra, lacks in extras.items():
        if lacks:
            remedy = f"for it, run `pip install 'pumice[{extra}]'`"
            found.append(Finding(f"extra {extra}", f"lacks {', '.join(lacks)}", "note", remedy, value=False))
        else:
            found.append(Finding(f"extra {extra}", "complete", value=True))
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
