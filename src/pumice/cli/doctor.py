"""`pumice doctor`: check the installation and the machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from pumice import __version__
from pumice.cli import options
from pumice.errors import counted
from pumice.jsonl import print_json

if TYPE_CHECKING:
    from rich.console import Console

    from pumice.cli.checks import Finding

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("FIX", "bold red")}


def doctor(
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    test: Annotated[bool, Option(help="Run small models, some seconds.")] = True,
) -> None:
    """Say what is installed, what works, and what to do about what does not. Status 1 on a problem."""
    options.share_cores()
    from rich.console import Console

    start = time.perf_counter()
    sections: dict[str, list[Finding]] = {}
    console = Console(highlight=False, soft_wrap=True)
    for title, findings in examine(test=test):
        sections[title] = findings
        if not as_json:
            _print(console, title, findings)
    problems = sum(finding.level == "problem" for findings in sections.values() for finding in findings)
    if as_json:
        values = {
            "pumice": __version__,
            "ok": not problems,
            "problems": problems,
            "seconds": round(time.perf_counter() - start, 1),
            "sections": {title: [asdict(f) for f in findings] for title, findings in sections.items()},
        }
        print_json(values)
    elif problems:
        console.print(f"{counted(problems, 'problem')}; each has a remedy above.")
    else:
        console.print("Nothing is wrong.")
    if problems:
        raise typer.Exit(1)


def examine(*, test: bool = True) -> Iterator[tuple[str, list[Finding]]]:
    """Run all checks, and yield (title, findings) for each section.

    test: also run the self-test, which takes some seconds.
    """
    from pumice.cli import checks, trial

    libraries = checks.versions()
    yield "versions", libraries
    torch_works = next(finding.level == "ok" for finding in libraries if finding.name == "torch")
    if torch_works:
        yield "devices", checks.devices()
        yield "threads", checks.threads()
    yield "caches", checks.caches()
    if test and torch_works:
        yield "self-test", trial.self_test()


def _print(console: Console, title: str, findings: list[Finding]) -> None:
    from rich.text import Text

    console.print(Text(title, "bold"))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, style = _MARKS[finding.level]
        line = Text("  ").append(f"{mark:<4}", style).append(f"  {finding.name:<{width}}  {finding.says}")
        console.print(line)
        if finding.remedy:
            console.print(Text(" " * (width + 10)).append(f"-> {finding.remedy}", style))
    console.print()
