"""How much memory this machine, or its container, has and has free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GB = 1e9


def ram(root: Path = Path("/")) -> tuple[int, int | None]:
    """Return (total, available) memory in bytes. Available is None where the system does not report it.

    Pages that only cache files count as available: the system gives them up when they are needed.
    """
    sizes = {name: kb * 1024 for name, kb in _numbers(root / "proc/meminfo", ":").items()}
    if "MemTotal" not in sizes:
        if not hasattr(os, "sysconf"):
            return 0, None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
    # A container may use less than the machine has: the files are those of cgroup v2, then of v1.
    cgroup = root / "sys/fs/cgroup"
    for group, limit, used in (
        (cgroup, "memory.max", "memory.current"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit_bytes, used_bytes = _number(group / limit), _number(group / used)
        if limit_bytes is not None and limit_bytes < total:
            total = limit_bytes
            stat = _numbers(group / "memory.stat", " ")
            cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            free = min(free, total - max(0, used_bytes - cached) if used_bytes is not None else total)
    return total, max(0, free)


def available_memory() -> float | None:
    """Return the bytes that a new process could use; None where the system does not report them."""
    return ram()[1]


def free_on(device: torch.device) -> float | None:
    """Return the bytes that this process could use on a device; None where the system does not report them.

    PyTorch keeps a GPU's memory that was freed for its next tensors: the driver does not count it as free.
    """
    if device.type != "cuda":
        return available_memory()
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _numbers(path: Path, separator: str) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line."""
    pairs = (line.partition(separator) for line in _text(path).splitlines())
    found = {name: rest.split() for name, _, rest in pairs}
    return {name: int(words[0]) for name, words in found.items() if words and words[0].isdecimal()}
