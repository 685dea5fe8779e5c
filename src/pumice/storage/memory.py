"""How much memory this machine, or its container, has free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GB = 1e9


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that a new process could use; None where the system does not report them.

    Pages that only cache files count as available: the system gives them up when they are needed.
    """
    sizes = {name: kb * 1024 for name, kb in _numbers(root / "proc/meminfo", ":").items()}
    if "MemTotal" not in sizes:
        return _available_elsewhere()
    free = sizes.get("MemAvailable", sizes["MemFree"])
    # A container, a job or a service may use less than the machine has.
    for group, limit, used in _groups(root):
        limit_bytes, used_bytes = _number(group / limit), _number(group / used)
        if limit_bytes is not None and limit_bytes < sizes["MemTotal"]:
            stat = _numbers(group / "memory.stat", " ")
            cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
            left = limit_bytes if used_bytes is None else limit_bytes - max(0, used_bytes - cached)
            free = min(free, left)
    # `ulimit -v` bounds the addresses of a process, mapped files included.
    if (addresses := _address_limit()) is not None:
        used_addresses = _numbers(root / "proc/self/status", ":").get("VmSize", 0) * 1024
        free = min(free, addresses - used_addresses)
    return max(0, free)


def _available_elsewhere() -> int | None:
    """Return the available memory of macOS and Windows, which have no /proc."""
    try:
        import psutil
    except ImportError:  # on Linux it is no requirement
        return None
    return int(psutil.virtual_memory().available)


def _groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the memory cgroups of this process and those above: the folder, its files of limit and use.

    A container may see its own group as the topmost one, whatever its path is called outside.
    """
    cgroup = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/", "0:memory:/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # cgroup v2
            top, files = cgroup, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):  # v1
            top, files = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.strip("/")
        yield from ((folder, *files) for folder in (group, *group.parents) if folder.is_relative_to(top))


def _address_limit() -> int | None:
    """Return the bytes of addresses that this process may have; None without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


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
