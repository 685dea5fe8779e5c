"""Checks of the machine: processor, GPUs and threads, within the limits of a container."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

from pumice.cli.checks.finding import Finding, Level, format_count, format_size

GPU_MEMORY = 1.5e9  # bytes; pumice-tiny needs about 1 GB


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
            is_full = free < GPU_MEMORY
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
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()  # cgroup v2: "quota period", or "max period"
    if len(quota) != 2:
        cgroup_v1 = root / "sys/fs/cgroup/cpu"
        quota = (_read(cgroup_v1 / "cpu.cfs_quota_us") + _read(cgroup_v1 / "cpu.cfs_period_us")).split()
    if len(quota) == 2 and quota[0].isdecimal() and int(quota[1]):
        cores = min(cores, max(1, -(-int(quota[0]) // int(quota[1]))))
    return cores


def threads(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> list[Finding]:
    """Check the numbers of threads and OpenMP's settings against the usable cores.

    Decoding consists of many small matrix products, so threads that wait for each other cost much time.
    """
    import torch

    cores, used = usable_cores(root), torch.get_num_threads()
    available = format_count(cores, "core")
    level: Level = "ok"
    remedy = ""
    if used > cores:
        level = "problem"
        remedy = f"run `export OMP_NUM_THREADS={cores}`: threads that wait for a core stop all the others"
    findings = [Finding("torch threads", f"{used} on {available}", level, remedy, used)]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        setting = environ.get(name)
        if setting is None:
            continue
        level, says, remedy = "ok", setting, ""
        if not setting.isdecimal() or not int(setting):
            level, says = "problem", f"{setting!r} is not a number of threads"
            remedy = f"run `unset {name}`, or give a number of cores"
        elif int(setting) < cores:
            level, says = "note", f"{setting}, {format_count(cores - int(setting), 'core')} idle"
            remedy = "fine beside other work; otherwise unset it"
        findings.append(Finding(name, says, level, remedy, setting))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = load > 0.75 * cores
    policy = environ.get("OMP_WAIT_POLICY")
    level, remedy = "ok", ""
    says = (
        policy or "not set: each command chooses, spinning on an idle machine and sleeping beside other work"
    )
    if policy is not None and policy.upper() == "ACTIVE" and busy:
        level, says = "note", f"ACTIVE on a busy machine, load {load:.1f}"
        remedy = "run `unset OMP_WAIT_POLICY`: threads that spin beside other work slow down both"
    findings.append(Finding("OMP_WAIT_POLICY", says, level, remedy, policy))
    remedy = "other processes are busy: everything takes longer than it could" if busy else ""
    level = "note" if busy else "ok"
    return [*findings, Finding("load", f"{load:.1f} for {available}", level, remedy, load)]


def _processor() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> str:
    """Return the text of a file of the system, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
