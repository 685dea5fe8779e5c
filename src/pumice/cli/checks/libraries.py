"""Checks of the versions of Python, torch, the required libraries and the extras."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

from pumice import __version__
from pumice.cli.checks.finding import Finding
from pumice.errors import install

_FOR_DEVELOPERS = ("dev", "docs")  # extras that nobody needs who uses Pumice


def versions() -> list[Finding]:
    """Check Python, torch and the required libraries, and which extras are complete.

    Versions come from package metadata, so torch is the only library that is imported.
    """
    findings = [Finding("pumice", f"{__version__} in {Path(__file__).parents[2]}", value=__version__)]
    python = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    findings.append(Finding("python", python, value=platform.python_version()))
    findings.append(_torch())
    try:
        requirements = importlib.metadata.requires("pumice") or []
    except importlib.metadata.PackageNotFoundError:
        remedy = "install it with pip, so that the versions of its libraries can be checked"
        return [*findings, Finding("libraries", "this Pumice was not installed by pip", "note", remedy)]
    return findings + _libraries(requirements)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken library can raise any exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding("torch", f"cannot be imported ({reason})", "problem", "run `pip install -U torch`")
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Finding("torch", f"{torch.__version__}, {kind}", value=torch.__version__)


def _libraries(requirements: list[str]) -> list[Finding]:
    """Check requirements as package metadata lists them, where markers name the extras."""
    from packaging.requirements import Requirement

    findings: list[Finding] = []
    extras: dict[str, list[str]] = {}  # extra -> missing requirements
    installed: dict[str, str] = {}
    for line in requirements:
        requirement = Requirement(line)
        extra_match = re.search(r"extra == ['\"]([\w.-]+)['\"]", line)
        extra = extra_match[1] if extra_match else ""
        if extra in _FOR_DEVELOPERS:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if extra:
            extras.setdefault(extra, [])
        if requirement.name == "pumice":
            continue
        version = _version(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            if not extra:
                installed[requirement.name] = version
            continue
        text = f"{requirement.name}{requirement.specifier}"
        if extra:
            extras[extra].append(text if version is None else f"{text} (found {version})")
        elif version is None:
            remedy = f"run `pip install '{text}'`"
            findings.append(Finding(requirement.name, "is not installed", "problem", remedy))
        else:
            remedy = f"run `pip install -U '{text}'`"
            findings.append(Finding(requirement.name, f"{version} is not {text}", "problem", remedy))
    summary = ", ".join(f"{name} {version}" for name, version in installed.items() if name != "torch")
    findings.insert(0, Finding("libraries", summary, value=installed))
    for extra, missing in extras.items():
        if missing:
            remedy = f"for it, run `{install(extra)}`"
            findings.append(
                Finding(f"extra {extra}", f"lacks {', '.join(missing)}", "note", remedy, value=False)
            )
        else:
            findings.append(Finding(f"extra {extra}", "complete", value=True))
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
