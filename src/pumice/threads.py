"""How many threads should compute here: the usable cores, and how they wait beside other programs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

_LOG = logging.getLogger("pumice")

BUSY = 0.75  # of the cores: the load from which other programs slow down whatever is started now


def usable_cores(root: Path = Path("/")) -> int:
    """Return the usable cores: the process's affinity, limited by a container's quota (rounded up)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    group = root / "sys/fs/cgroup"
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, then v1
        if all((group / file).is_file() for file in files):
            quota, period = " ".join((group / file).read_text() for file in files).split()
            if quota.isdecimal():  # else there is no limit: "max", or -1
                cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def busy_load() -> float:
    """Return how many threads ran or waited for a core in the last minute; 0 where nobody says it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def fewer_threads(threads: int) -> int | None:
    """Return how many of so many threads should compute beside other busy programs; None for all."""
    cores, load = usable_cores(), busy_load()
    free = max(1, int(cores - load))
    return free if load > BUSY * cores and free < threads else None


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait for each other, where other programs are busy.

    Threads that spin take the cores from those that they wait for: beside two busy loops on two cores, an
    answer took 2 to 8 s, and 0.2 s with threads that sleep. OpenMP reads this once, as torch is imported:
    where that has happened, a warning says what to do. What is set already stays.
    """
    if "OMP_WAIT_POLICY" in os.environ or busy_load() <= BUSY * usable_cores():
        return
    torch = sys.modules.get("torch")
    if torch is None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    elif torch.get_num_threads() > 1 and not torch.cuda.is_available():
        _LOG.warning(
            "other programs are busy, and threads that wait for a core stop all the others: answers may be "
            "ten times as fast if OMP_WAIT_POLICY=PASSIVE is set before Python imports torch"
        )
