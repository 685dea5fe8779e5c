"""The machine: processor, GPUs, threads, memory and disks, within what a container allows."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pumice.cli.checks.finding import DISK, MEMORY, Finding, count, existing, lines, size, words


def devices() -> list[Finding]:
    """The processor, NVIDIA and Apple GPUs, and which device is taken when none is named."""
    import torch

    from pumice.formats.load import find_device

    cores = usable_cores()
    level = torch.backends.cpu.get_cpu_capability()
    found = [
        Finding("cpu", f"{_processor()}, {count(cores, 'usable core')}, {level}", value=cores),
        _compiled(),
    ]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            says = f"{torch.cuda.get_device_name(number)}, {size(free)} of {size(total)} free"
            full = free < MEMORY
            remedy = "another process fills it: see nvidia-smi" if full else ""
            found.append(Finding(f"cuda:{number}", says, "problem" if full else "ok", remedy, total))
    elif shutil.which("nvidia-smi"):
        why = "this torch is a CPU build" if torch.version.cuda is None else "the driver does not suit torch"
        remedy = "install torch for your driver: https://pytorch.org/get-started/locally"
        found.append(Finding("cuda", f"there is an nvidia-smi, but {why}", "problem", remedy))
    else:
        found.append(Finding("cuda", "none", value=False))
    if torch.backends.mps.is_available():
        limit = torch.mps.recommended_max_memory()
        found.append(Finding("mps", f"up to {size(limit)}", value=limit))
    chosen = find_device().type
    found.append(Finding("chosen", f"{chosen}, unless --device names another", value=chosen))
    return found


def _compiled() -> Finding:
    """Whether weights in few bits are multiplied by compiled code, and by which."""
    from pumice.kernels.compute import kernel_name
    from pumice.kernels.loader import compiled

    code, why = compiled("packed")
    if code is not None:
        says = f"weights of 4, 8 and 32 bits in code compiled for this processor ({kernel_name()})"
        return Finding("decoding", says, value=True)
    remedy = "install gcc: weights in few bits are slow without it" if "no C compiler" in why else ""
    says = f"weights in few bits without compiled code: {why}"
    return Finding("decoding", says, "note" if remedy else "ok", remedy, False)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: by its affinity, and by a container's quota (rounded up)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = words(root / "sys/fs/cgroup/cpu.max")  # cgroup v2: "quota period", or "max period"
    if len(quota) != 2:
        old = root / "sys/fs/cgroup/cpu"
        quota = words(old / "cpu.cfs_quota_us") + words(old / "cpu.cfs_period_us")
    if len(quota) == 2 and quota[0].isdecimal() and int(quota[1]):
        cores = min(cores, max(1, -(-int(quota[0]) // int(quota[1]))))
    return cores


def threads(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> list[Finding]:
    """OpenMP's settings against the cores that there are; decoding is many small products."""
    import torch

    cores, used = usable_cores(root), torch.get_num_threads()
    found = []
    if used > cores:
        remedy = f"run `export OMP_NUM_THREADS={cores}`: threads that wait for a core stop all the others"
        found.append(
            Finding("torch threads", f"{used} on {count(cores, 'core')}", "problem", remedy, value=used)
        )
    else:
        found.append(Finding("torch threads", f"{used} on {count(cores, 'core')}", value=used))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        given = environ.get(name)
        if given is None:
            continue
        if not given.isdecimal() or not int(given):
            remedy = f"run `unset {name}`, or give a number of cores"
            found.append(Finding(name, f"{given!r} is no number of threads", "problem", remedy, value=given))
        elif int(given) < cores:
            remedy = "fine beside other work; otherwise unset it"
            found.append(
                Finding(name, f"{given}, {count(cores - int(given), 'core')} idle", "note", remedy, given)
            )
        else:
            found.append(Finding(name, given, value=given))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    policy = environ.get("OMP_WAIT_POLICY")
    if policy is None:
        says = "not set: each command chooses, spinning on an idle machine and sleeping beside other work"
        found.append(Finding("OMP_WAIT_POLICY", says))
    elif policy.upper() == "ACTIVE" and load > 0.75 * cores:
        remedy = "run `unset OMP_WAIT_POLICY`: threads that spin beside other work slow down both"
        found.append(Finding("OMP_WAIT_POLICY", f"ACTIVE on a busy machine, load {load:.1f}", "note", remedy))
    else:
        found.append(Finding("OMP_WAIT_POLICY", policy, value=policy))
    busy = load > 0.75 * cores
    says = f"{load:.1f} for {count(cores, 'core')}"
    remedy = "other processes are busy: everything takes longer than it could" if busy else ""
    found.append(Finding("load", says, "note" if busy else "ok", remedy, value=load))
    return found


def _processor() -> str:
    for line in lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory(root: Path = Path("/")) -> list[Finding]:
    """RAM, within a container's limit, and room on the disks that are written to."""
    total, free = ram(root)
    few = free is not None and free < MEMORY
    says = f"{size(total)}" if free is None else f"{size(free)} of {size(total)} available"
    remedy = f"pumice-tiny wants {size(MEMORY)}: end other programs, or give the container more"
    found = [Finding("ram", says, "problem" if few else "ok", remedy if few else "", free or total)]
    from pumice.files import cache_folder

    places = {"cache": cache_folder(), "working folder": Path(), "temporary": Path(tempfile.gettempdir())}
    for name, place in places.items():
        nearest = existing(place)
        left = shutil.disk_usage(nearest).free
        full = left < DISK
        remedy = "make room, or name another place" + {"cache": " with PUMICE_CACHE"}.get(name, "")
        says = f"{size(left)} free at {nearest.absolute()}"
        found.append(
            Finding(f"disk, {name}", says, "problem" if full else "ok", remedy if full else "", left)
        )
    return found


def ram(root: Path = Path("/")) -> tuple[int, int | None]:
    """Bytes of memory in all and available; None where the system does not say."""
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in lines(root / "proc/meminfo")
        if line.endswith(" kB")
    }
    if "MemTotal" not in sizes:
        if not hasattr(os, "sysconf"):
            return 0, None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
    group = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = words(group / limit), words(group / used)
        if most and most[0].isdecimal() and int(most[0]) < total:
            total = int(most[0])
            free = min(free, total - int(now[0]) if now else total)
    return total, max(0, free)
