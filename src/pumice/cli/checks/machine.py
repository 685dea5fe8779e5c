"""Checks of the machine: processor, GPUs, threads, memory and disks, within the limits of a container."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pumice.cli.checks.finding import (
    DISK,
    MEMORY,
    Finding,
    existing_folder,
    format_count,
    format_size,
    lines,
    words,
)
from pumice.storage.memory import ram


def devices() -> list[Finding]:
    """Check the processor and the GPUs, and report which device is the default."""
    import torch

    from pumice.formats.load import find_device

    cores = usable_cores()
    level = torch.backends.cpu.get_cpu_capability()
    says = f"{_processor()}, {format_count(cores, 'usable core')}, {level}"
    findings = [Finding("cpu", says, value=cores), _native_code()]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            says = f"{torch.cuda.get_device_name(number)}, {format_size(free)} of {format_size(total)} free"
            is_full = free < MEMORY
            remedy = "another process fills it: see nvidia-smi" if is_full else ""
            findings.append(Finding(f"cuda:{number}", says, "problem" if is_full else "ok", remedy, total))
    elif shutil.which("nvidia-smi"):
        reason = (
            "this torch is a CPU build" if torch.version.cuda is None else "the driver does not suit torch"
        )
        remedy = "install torch for your driver: https://pytorch.org/get-started/locally"
        findings.append(Finding("cuda", f"there is an nvidia-smi, but {reason}", "problem", remedy))
    else:
        findings.append(Finding("cuda", "none", value=False))
    if torch.backends.mps.is_available():
        limit = torch.mps.recommended_max_memory()
        findings.append(Finding("mps", f"up to {format_size(limit)}", value=limit))
    chosen = find_device().type
    findings.append(Finding("chosen", f"{chosen}, unless --device names another", value=chosen))
    return findings


def _native_code() -> Finding:
    """Report whether compiled code multiplies weights in few bits, and which kernel does."""
    from pumice.kernels.compute import kernel_name
    from pumice.kernels.loader import compiled

    code, reason = compiled("packed")
    if code is not None:
        says = f"weights of 4, 8 and 32 bits in code compiled for this processor ({kernel_name()})"
        return Finding("decoding", says, value=True)
    remedy = "install gcc: weights in few bits are slow without it" if "no C compiler" in reason else ""
    says = f"weights in few bits without compiled code: {reason}"
    return Finding("decoding", says, "note" if remedy else "ok", remedy, False)


def usable_cores(root: Path = Path("/")) -> int:
    """Return the usable cores: the process's affinity, limited by a container's quota (rounded up)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = words(root / "sys/fs/cgroup/cpu.max")  # cgroup v2: "quota period", or "max period"
    if len(quota) != 2:
        cgroup_v1 = root / "sys/fs/cgroup/cpu"
        quota = words(cgroup_v1 / "cpu.cfs_quota_us") + words(cgroup_v1 / "cpu.cfs_period_us")
    if len(quota) == 2 and quota[0].isdecimal() and int(quota[1]):
        cores = min(cores, max(1, -(-int(quota[0]) // int(quota[1]))))
    return cores


def threads(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> list[Finding]:
    """Check the numbers of threads and OpenMP's settings against the usable cores.

    Decoding consists of many small matrix products, so threads that wait for each other cost much time.
    """
    import torch

    cores, used = usable_cores(root), torch.get_num_threads()
    findings = []
    if used > cores:
        remedy = f"run `export OMP_NUM_THREADS={cores}`: threads that wait for a core stop all the others"
        findings.append(
            Finding(
                "torch threads", f"{used} on {format_count(cores, 'core')}", "problem", remedy, value=used
            )
        )
    else:
        findings.append(Finding("torch threads", f"{used} on {format_count(cores, 'core')}", value=used))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        setting = environ.get(name)
        if setting is None:
            continue
        if not setting.isdecimal() or not int(setting):
            remedy = f"run `unset {name}`, or give a number of cores"
            findings.append(
                Finding(name, f"{setting!r} is not a number of threads", "problem", remedy, value=setting)
            )
        elif int(setting) < cores:
            remedy = "fine beside other work; otherwise unset it"
            findings.append(
                Finding(
                    name,
                    f"{setting}, {format_count(cores - int(setting), 'core')} idle",
                    "note",
                    remedy,
                    setting,
                )
            )
        else:
            findings.append(Finding(name, setting, value=setting))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    policy = environ.get("OMP_WAIT_POLICY")
    if policy is None:
        says = "not set: each command chooses, spinning on an idle machine and sleeping beside other work"
        findings.append(Finding("OMP_WAIT_POLICY", says))
    elif policy.upper() == "ACTIVE" and load > 0.75 * cores:
        remedy = "run `unset OMP_WAIT_POLICY`: threads that spin beside other work slow down both"
        findings.append(
            Finding("OMP_WAIT_POLICY", f"ACTIVE on a busy machine, load {load:.1f}", "note", remedy)
        )
    else:
        findings.append(Finding("OMP_WAIT_POLICY", policy, value=policy))
    busy = load > 0.75 * cores
    says = f"{load:.1f} for {format_count(cores, 'core')}"
    remedy = "other processes are busy: everything takes longer than it could" if busy else ""
    findings.append(Finding("load", says, "note" if busy else "ok", remedy, value=load))
    return findings


def _processor() -> str:
    for line in lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory(root: Path = Path("/")) -> list[Finding]:
    """Check the RAM, within a container's limit, and the free space on the disks that Pumice writes to."""
    total, free = ram(root)
    is_short = free is not None and free < MEMORY
    says = (
        f"{format_size(total)}" if free is None else f"{format_size(free)} of {format_size(total)} available"
    )
    remedy = f"pumice-tiny needs {format_size(MEMORY)}: end other programs, or give the container more"
    findings = [
        Finding("ram", says, "problem" if is_short else "ok", remedy if is_short else "", free or total)
    ]
    from pumice.files import cache_folder

    folders = {"cache": cache_folder(), "working folder": Path(), "temporary": Path(tempfile.gettempdir())}
    for name, folder in folders.items():
        nearest = existing_folder(folder)
        free_bytes = shutil.disk_usage(nearest).free
        is_full = free_bytes < DISK
        remedy = "free some space, or choose another folder" + {"cache": " with PUMICE_CACHE"}.get(name, "")
        says = f"{format_size(free_bytes)} free at {nearest.absolute()}"
        findings.append(
            Finding(
                f"disk, {name}", says, "problem" if is_full else "ok", remedy if is_full else "", free_bytes
            )
        )
    return findings
