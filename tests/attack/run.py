"""Attack Pumice for a stated time, and print one table: what was tried, right and wrong.

    python tests/attack/run.py --minutes 20
    python tests/attack/run.py --only files --seed 28 --first 311 --minutes 1

Every try has a number, and draws from `random.Random(f"{seed}/{attack}/{number}")` alone. The last line says
how to repeat the first wrong one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import control_tokens
import damaged_files
import engine_schedules
import kills
import server_requests

SCHEDULES = 10_000
SHARES = {"schedules": 5, "files": 3}  # of the time, for their many cases; 1 for all others
# An attack gets a folder, and yields functions that do one try each and return what is wrong, or "".
Attack = Callable[[Path], Generator[Callable[[random.Random], str], None, None]]
ATTACKS: dict[str, Attack] = {
    "schedules": engine_schedules.attack,
    "requests": server_requests.attack,
    "loads": server_requests.loads,
    "tokens": control_tokens.attack,
    "files": damaged_files.attack,
    "kills": kills.kill,
    "disks": kills.fill_disk,
}


def run(name: str, seed: int, first: int, seconds: float) -> tuple[int, list[str]]:
    """Attack for so many seconds, once at least. Return the number of tries, and those that went wrong."""
    wrong: list[str] = []
    end, tries = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory(prefix="pumice-attack-") as folder:
        attack = ATTACKS[name](Path(folder))
        for number, attempt in enumerate(itertools.islice(attack, first, None), first):
            try:
                problem = attempt(random.Random(f"{seed}/{name}/{number}"))
            except Exception as error:  # the attack's own fault counts as well
                problem = f"{type(error).__name__}: {error}"
            tries += 1
            if problem:
                wrong.append(f"{name} {number}: {problem[:300]}")
            if time.monotonic() > end or (name == "schedules" and tries == SCHEDULES):
                break
        attack.close()
    return tries, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of all attacks together")
    parser.add_argument("--seed", type=int, default=28)
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    parser.add_argument("--only", default=",".join(ATTACKS), help="names of attacks, separated by commas")
    options = parser.parse_args()
    names = options.only.split(",")
    problems: list[str] = []
    print(f"seed {options.seed}, {options.minutes:g} minutes\n")
    print("| attack | tried | right | wrong |\n|---|---|---|---|", flush=True)
    shares = {name: SHARES.get(name, 1) for name in names}
    for name, share in shares.items():
        seconds = options.minutes * 60 * share / sum(shares.values())
        tries, wrong = run(name, options.seed, options.first, seconds)
        print(f"| {name} | {tries} | {tries - len(wrong)} | {len(wrong)} |", flush=True)
        problems += wrong
    for problem in problems[:50]:
        print(problem)
    if problems:
        name, number = problems[0].partition(":")[0].split()
        again = f"--only {name} --seed {options.seed} --first {number} --minutes 0"
        print(f"again: python tests/attack/run.py {again}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
