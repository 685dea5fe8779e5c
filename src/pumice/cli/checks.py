"""The checks of `pumice doctor` that read: versions, devices, threads and caches. They change nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pumice import __version__
from pumice.errors import InputError, counted, install
from pumice.threads import BUSY, busy_load, usable_cores

Level = Literal["ok", "note", "problem"]
GPU_MEMORY = 1.5e9  # bytes; pumice-tiny needs about 1 GB
_FOR_DEVELOPERS = ("dev", "docs")  # extras that nobody needs who uses Pumice


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    says: one line for people. level: ok; note (nothing fails); problem (something will fail). remedy: what to
    do. value: the result for programs.
    """

    name: str
    says: str
    level: Level = "ok"
    remedy: str = ""
    value: Any = None


def versions() -> list[Finding]:
    """Check Python, torch and the required libraries, and which extras are complete.

    Versions come from package metadata, so torch is the only library that is imported.
    """
    python = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    findings = [
        Finding("pumice", f"{__version__} in {Path(__file__).parents[1]}", value=__version__),
        Finding("python", python, value=platform.python_version()),
        _torch(),
    ]
    try:
        return findings + _libraries(importlib.metadata.requires("pumice") or [])
    except importlib.metadata.PackageNotFoundError:
        remedy = "install it with pip, so that the versions of its libraries can be checked"
        return [*findings, Finding("libraries", "this Pumice was not installed by pip", "note", remedy)]


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken library can raise any exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding("torch", f"cannot be imported ({reason})", "problem", "run `pip install -U torch`")
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Finding("torch", f"{torch.__version__}, {kind}", value=torch.__version__)


def _libraries(requirements: list[str]) -> list[Finding]:
    """Check requirements as package metadata lists them, where markers name the extras."""
    from packaging.requirements import Requirement

    problems: list[Finding] = []
    lacking: dict[str, list[str]] = {}  # extra -> missing requirements
    installed: dict[str, str] = {}
    for line in requirements:
        requirement = Requirement(line)
        name, text = requirement.name, f"{requirement.name}{requirement.specifier}"
        named = re.search(r"extra == ['\"]([\w.-]+)['\"]", line)
        extra = named[1] if named else ""
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if extra in _FOR_DEVELOPERS or name == "pumice" or not applies:
            continue
        version = _version(name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        if extra:
            missing = text if version is None else f"{text} (found {version})"
            lacking.setdefault(extra, []).extend([] if fits else [missing])
        elif version is not None and fits:
            installed[name] = version
        else:
            says = "is not installed" if version is None else f"{version} is not {text}"
            problems.append(Finding(name, says, "problem", f"run `pip install -U '{text}'`"))
    summary = ", ".join(f"{name} {version}" for name, version in installed.items() if name != "torch")
    extras = [_extra(name, missing) for name, missing in lacking.items()]
    return [Finding("libraries", summary, value=installed), *problems, *extras]


def _extra(name: str, missing: list[str]) -> Finding:
    if not missing:
        return Finding(f"extra {name}", "complete", value=True)
    remedy = f"for it, run `{install(name)}`"
    return Finding(f"extra {name}", f"lacks {', '.join(missing)}", "note", remedy, value=False)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[Finding]:
    """Check the processor, its compiled code and the GPUs, and report which device is the default."""
    import torch

    from pumice.formats.load import find_device

    cores = usable_cores()
    says = f"{_processor()}, {counted(cores, 'usable core')}, {torch.backends.cpu.get_cpu_capability()}"
    findings = [Finding("cpu", says, value=cores), _native_code()]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        says = f"{torch.cuda.get_device_name(number)}, {_size(free)} of {_size(total)} free"
        level: Level = "problem" if free < GPU_MEMORY else "ok"
        remedy = "another process fills it: see nvidia-smi" if free < GPU_MEMORY else ""
        findings.append(Finding(f"cuda:{number}", says, level, remedy, total))
    if not torch.cuda.is_available():
        findings.append(_no_cuda(torch.version.cuda))
    chosen = find_device().type
    return [*findings, Finding("chosen", f"{chosen}, unless --device names another", value=chosen)]


def _no_cuda(built_for: str | None) -> Finding:
    """Report that CUDA is not there; a problem if the driver's program is."""
    from shutil import which

    if which("nvidia-smi") is None:
        return Finding("cuda", "none", value=False)
    reason = "this torch is a CPU build" if built_for is None else "the driver does not suit torch"
    remedy = "install torch for your driver: https://pytorch.org/get-started/locally"
    return Finding("cuda", f"there is an nvidia-smi, but {reason}", "problem", remedy)


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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def threads(root: Path = Path("/")) -> list[Finding]:
    """Check torch's threads against the usable cores, and the load.

    Decoding consists of many small matrix products, so threads that wait for each other cost much time.
    """
    import torch

    cores, used = usable_cores(root), torch.get_num_threads()
    available = counted(cores, "core")
    own, others = Finding("torch threads", f"{used} on {available}", value=used), _load(cores, available)
    if used <= cores:
        return [own, others]
    remedy = f"run `export OMP_NUM_THREADS={cores}`: threads that wait for a core stop all the others"
    return [replace(own, level="problem", remedy=remedy), others]


def _load(cores: int, available: str) -> Finding:
    load = busy_load()
    finding = Finding("load", f"{load:.1f} for {available}", value=load)
    if load <= BUSY * cores:
        return finding
    remedy = "other processes are busy: everything takes longer than it could"
    return replace(finding, level="note", remedy=remedy)


def caches() -> list[Finding]:
    """Check the folder of downloaded parts, and each part in it."""
    from pumice.files import cache_folder, folder_size, nearest
    from pumice.storage.download import WHEELS, cached, is_intact

    folder = cache_folder().absolute()
    found = nearest(folder)
    if found is not None and os.access(found, os.W_OK):
        findings = [Finding("pumice", f"{folder}, {_size(folder_size(folder))}", value=str(folder))]
    else:
        remedy = "set PUMICE_CACHE to a folder that you may write to"
        says = f"{found or folder} cannot be written to"
        findings = [Finding("pumice", says, "problem", remedy, str(folder))]
    findings.append(_copies())
    for name, part in WHEELS.items():
        path = cached(part)
        if path is None:
            remedy = 'it is fetched when pumice-tiny is first used: pumice ask "Hello"'
            findings.append(Finding(name, "not fetched yet", "note", remedy, value="absent"))
        elif is_intact(part, path):
            says = f"{_size(path.stat().st_size)}, SHA-256 as pinned"
            findings.append(Finding(name, says, value="intact"))
        else:
            remedy = f"delete {part.folder}; it is fetched again when it is needed"
            findings.append(Finding(name, "is damaged: its SHA-256 differs", "problem", remedy, "damaged"))
    return findings


def _copies() -> Finding:
    """Check the matrices that are kept in the layout of the kernels, of GGUF files and built-in models."""
    from pumice.files import folder_size
    from pumice.formats.pumice.quantized import LIMIT_VARIABLE, cache_limit, copies_folder

    folder = copies_folder().absolute()
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    size = folder_size(folder)
    try:
        limit = cache_limit()
    except InputError as error:
        return Finding("copies", str(error), "problem", f"unset {LIMIT_VARIABLE}, or set it to 20", size)
    says = f"{counted(count, 'folder')} of quantised weights in {folder}, {_size(size)} of at most "
    says += f"{_size(limit)} ({LIMIT_VARIABLE}); what you delete there is made again when it is used"
    if size <= limit:
        return Finding("copies", says, value=size)
    remedy = "that is over the limit: the next start of a model in few bits removes the least used"
    return Finding("copies", says, "note", remedy, size)


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
