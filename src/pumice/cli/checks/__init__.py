"""The checks of `pumice doctor`: versions, devices, threads, memory, caches, network and a self-test.

They change nothing. They use the network only if the caller asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pumice import __version__
from pumice.cli.checks.fetching import caches, connections, settings
from pumice.cli.checks.finding import Finding
from pumice.cli.checks.libraries import versions
from pumice.cli.checks.machine import devices, memory, threads
from pumice.cli.checks.trial import self_test

__all__ = ["DoctorReport", "Finding", "examine"]


@dataclass
class DoctorReport:
    """The findings of all checks. sections: title -> findings. seconds: how long the checks took."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def problems(self) -> list[Finding]:
        return [
            finding for section in self.sections.values() for finding in section if finding.level == "problem"
        ]

    def to_dict(self) -> dict[str, Any]:
        sections = {
            title: [asdict(finding) for finding in findings] for title, findings in self.sections.items()
        }
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
    """Run all checks, and yield (title, findings) for each section.

    test: also run the self-test, which takes some seconds. network: also ask the package index and the hub
    whether they answer. environ: the variables as the user set them.
    """
    libraries = versions()
    yield "versions", libraries
    torch_works = next(finding.level == "ok" for finding in libraries if finding.name == "torch")
    if torch_works:
        yield "devices", devices()
        yield "threads", threads(environ)
    yield "memory", memory()
    yield "caches", caches()
    yield "network", settings(environ) + (connections(environ) if network else [])
    if test and torch_works:
        yield "self-test", self_test()
