"""Tell how much memory a new process could use on this machine."""

from __future__ import annotations

import os
from pathlib import Path

GB = 1e9
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory() -> float | None:
    """Return the bytes that can be used: the system's free memory, within a container's limit.

    None if the system does not say.
    """
    # A container sees the memory of its host, but may not use all of it: the lower limit counts.
    amounts = []
    if _MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        amounts.append(int(lines["MemAvailable"].split()[0]) * 1024.0)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        amounts.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    limit = _read_number(_CGROUP / "memory.max")
    if limit is not None:
        used = _read_number(_CGROUP / "memory.current") or 0
        # Pages of files that nobody used lately are given up when memory is needed.
        amounts.append(float(max(0, limit - max(0, used - _inactive_file_bytes()))))
    return min(amounts, default=None)


def _read_number(path: Path) -> int | None:
    """Return the number in a file; None without the file, or if it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file_bytes() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
