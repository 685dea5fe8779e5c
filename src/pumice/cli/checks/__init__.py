"""The checks of `pumice doctor`: versions, devices, threads, caches and a self-test. They change nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from pumice.cli.checks.caches import caches
from pumice.cli.checks.finding import Finding
from pumice.cli.checks.libraries import versions
from pumice.cli.checks.machine import devices, threads
from pumice.cli.checks.trial import self_test

__all__ = ["Finding", "examine"]


def examine(
    *, test: bool = True, environ: Mapping[str, str] = os.environ
) -> Iterator[tuple[str, list[Finding]]]:
    """Run all checks, and yield (title, findings) for each section.

    test: also run the self-test, which takes some seconds. environ: the variables as the user set them.
    """
    libraries = versions()
    yield "versions", libraries
    torch_works = next(finding.level == "ok" for finding in libraries if finding.name == "torch")
    if torch_works:
        yield "devices", devices()
        yield "threads", threads(environ)
    yield "caches", caches()
    if test and torch_works:
        yield "self-test", self_test()
