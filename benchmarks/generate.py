"""Measure rows per second and peak memory of `pumice data generate` and `data mix`, without the teacher.

    python benchmarks/generate.py [--rows 100000]

A journal of made-up replies is written; then the rows are parsed, checked, compared and written, and mixed
with themselves. A twentieth of the replies has something wrong with it. Each half runs in a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pumice.synth import kinds, run
from pumice.synth.context import AnnotatedBox, Context
from pumice.synth.journal import Journal, reply
from pumice.synth.teachers import LocalTeacher

THINGS = (
    "dog",
    "horse",
    "bicycle",
    "car",
    "bench",
    "bird",
    "cat",
    "boat",
    "kite",
    "umbrella",
    "chair",
    "truck",
)
COLOURS = ("red", "blue", "green", "white", "brown", "black", "yellow", "grey")
PLACES = ("beach", "garden", "street", "meadow", "harbour", "bridge", "market", "forest", "yard", "station")
DEEDS = ("walks slowly past", "stands right beside", "looks back at", "points towards", "waits in front of")


def context(number: int) -> Context:
    pick = random.Random(number)
    thing, colour, location = pick.choice(THINGS), pick.choice(COLOURS), pick.choice(PLACES)
    captions = (
        f"A person near a {colour} {thing} at the {location}.",
        f"A {thing} at a {location}, picture {number}.",
    )
    return Context(
        f"made/{number:06d}", f"{number:06d}.jpg", captions, (AnnotatedBox(thing, (0.1, 0.2, 0.5, 0.8)),)
    )


def answer(number: int) -> str:
    """A conversation about picture `number`; every twentieth has a fault."""
    pick = random.Random(number)
    thing, colour, location = pick.choice(THINGS), pick.choice(COLOURS), pick.choice(PLACES)
    if number % 60 == 3:
        return "I'm sorry, but I can't help with that."
    if number % 60 == 23:
        return f"Question: What is it?\nAnswer: The caption says a {thing}.\nQuestion: Where?\nAnswer: There."
    if number % 60 == 43:
        return answer(number - 1)
    words = " ".join(f"{pick.choice(COLOURS)}-{pick.randrange(10_000)}" for _ in range(12))
    return (
        f"Question: What can be seen at the {location}?\n"
        f"Answer: A {colour} {thing} can be seen at the {location}, and a person {pick.choice(DEEDS)} it.\n\n"
        "Question: What is written on the wall behind it?\n"
        f"Answer: One can read the signs {words} on the wall.\n\n"
        "Question: How many signs are there?\n"
        f"Answer: There are twelve signs, the last of which is number {pick.randrange(10**6)}.\n\n"
        f"Question: Is the {thing} moving?\n"
        f"Answer: It seems to be standing still while the person {pick.choice(DEEDS)} it."
    )


def job(folder: Path, rows: int) -> tuple[run.Job, LocalTeacher]:
    return run.Job(
        [context(n) for n in range(rows)], [(kinds.get("conversation"), 1.0)], folder
    ), LocalTeacher("made-up")


def write_journal(folder: Path, rows: int) -> None:
    current_job, teacher = job(folder, rows)
    journal = Journal(folder / "journal.jsonl")

    def records() -> Iterator[dict[str, object]]:
        for number, (_, _, _, request) in enumerate(run.plan(current_job, teacher)):
            yield from journal.sent(request, (0, 0), "made-up")
            yield reply(request.id, json.dumps({"text": answer(number)}), (0, 0))

    journal.append(records())


def finish(folder: Path, rows: int) -> None:
    current_job, teacher = job(folder, rows)
    start = time.perf_counter()
    journal = Journal(folder / "journal.jsonl")
    read = time.perf_counter() - start
    statistics = run.finish(current_job, teacher, journal)
    seconds = time.perf_counter() - start
    print(f"journal read in {read:.1f} s; {statistics.accepted:,} of {statistics.total:,} rows kept")
    print(f"  rejected: {dict(statistics.reasons['conversation'])}")
    _print_result("parse, checks, near-duplicates", rows, seconds)


def mix(folder: Path, rows: int) -> None:
    from pumice.synth.mix.build import build, load

    recipe = folder / "mix.yaml"
    files = {"rows": str(folder / "rows.jsonl")}
    recipe.write_text(json.dumps({"sources": [{"task": "llava", "files": files, "weight": 1.06}]}))
    start = time.perf_counter()
    manifest = build(load(recipe), folder / "mix.jsonl")
    _print_result(f"mix ({manifest['rows']:,} rows)", manifest["rows"], time.perf_counter() - start)


def _print_result(label: str, rows: int, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kB on Linux
    print(f"{label}: {seconds:.1f} s, {rows / seconds:,.0f} rows/s, peak memory {peak:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--part", choices=("finish", "mix"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        {"finish": finish, "mix": mix}[arguments.part](arguments.folder, arguments.rows)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_journal(folder, arguments.rows)
        size = (folder / "journal.jsonl").stat().st_size / 1e6
        print(f"{arguments.rows:,} replies in a journal of {size:.0f} MB", flush=True)
        for part in ("finish", "mix"):
            command = [
                sys.executable,
                __file__,
                "--rows",
                str(arguments.rows),
                "--folder",
                name,
                "--part",
                part,
            ]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
