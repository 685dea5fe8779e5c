"""What is here to work with, what is wrong with it, and what to do about that.

Knows the machine: versions, devices, threads, memory, caches, switches, and whether models run. Changes
nothing and reaches no network unless asked to. Does not know how its findings are printed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pumice import __version__
from pumice.cli.checks.fetching import answers, caches, switches
from pumice.cli.checks.finding import Finding
from pumice.cli.checks.libraries import versions
from pumice.cli.checks.machine import devices, memory, threads
from pumice.cli.checks.trial import self_test

__all__ = ["Finding", "Report", "examine"]


@dataclass
class DoctorReport:
    sections: dict[str, list[Finding]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def problems(self) -> list[Finding]:
        return [found for section in self.sections.values() for found in section if found.level == "problem"]

    def to_dict(self) -> dict[str, Any]:
        sections = {title: [asdict(found) for found in part] for title, part in self.sections.items()}
        return {
            "pumice": __version__,
            "ok": not self.problems,
            "problems": len(self.problems),
            "seconds": round(self.seconds, 1),
            "sections": sections,
        }


def examine(
    *, test: bool = True, network: bool = False, environ: Mapping[str, str] = os.environ
) -> Iterator[tuple[str, list[Finding]]]:
    """Look at everything, a section at a time: (its title, its findings).

    test: also run the self-test, which takes some seconds. network: also ask the package index and the hub
    whether they answer. environ: the variables as the user set them.
    """
    libraries = versions()
    yield "versions", libraries
    works = next(found.level == "ok" for found in libraries if found.name == "torch")
    if works:
        yield "devices", devices()
        yield "threads", threads(environ)
    yield "memory", memory()
    yield "caches", caches()
    yield "network", switches(environ) + (answers(environ) if network else [])
    if test and works:
        yield "self-test", self_test()
