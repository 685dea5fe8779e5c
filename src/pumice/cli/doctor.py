"""`pumice doctor`: check the installation and the machine."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from pumice.cli.checks import Finding

_MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("FIX", "bold red")}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    test: Annotated[bool, typer.Option(help="Run small models, some seconds.")] = True,
    network: Annotated[
        bool, typer.Option("--network", help="Also ask the package index and the hub whether they answer.")
    ] = False,
) -> None:
    """Say what is installed, what works, and what to do about what does not. Status 1 on a problem."""
    environ = dict(os.environ)
    options.share_cores()
    from rich.console import Console

    from pumice.cli.checks import DoctorReport, examine

    start = time.perf_counter()
    report = DoctorReport()
    console = Console(highlight=False, soft_wrap=True)
    for title, findings in examine(test=test, network=network, environ=environ):
        report.sections[title] = findings
        if not as_json:
            _print(console, title, findings)
    report.seconds = time.perf_counter() - start
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    elif report.problems:
        count = len(report.problems)
        console.print(f"{count} {'problem' if count == 1 else 'problems'}; each has a remedy above.")
    else:
        console.print("Nothing is wrong.")
    if report.problems:
        raise typer.Exit(1)


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
