"""Compile the C files into a library for this machine's processor."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

TIMEOUT = 900  # seconds: twenty on an idle machine, minutes where twenty programs share a core
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
# The fastest first; the first that the compiler accepts is used. Some compilers for ARM and POWER know
# "native" for -mcpu alone. Without OpenMP the code has one thread.
_NATIVE = (("-march=native",), ("-mcpu=native",), ())
TARGET_FLAGS = (*((*flags, "-fopenmp") for flags in _NATIVE), *_NATIVE)


def compile_library(command: list[str], sources: list[Path], library_path: Path) -> Path:
    """Compile C files into `library_path` and return it. Raise RuntimeError if the compiler fails."""
    # Link PyTorch's own OpenMP first: with two OpenMP libraries, two sets of threads would spin on one CPU.
    packages = Path(torch.__file__).parents[1]
    openmp = [
        str(path)
        for folder in ("torch/lib", "torch.libs")
        for path in sorted(packages.glob(f"{folder}/libgomp*.so*"))
    ]
    for target_flags in TARGET_FLAGS:
        libraries = openmp if "-fopenmp" in target_flags else []
        process = subprocess.run(
            [*command, *FLAGS, *target_flags, *map(str, sources), *libraries, "-o", str(library_path), "-lm"],
            capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False,
        )  # fmt: skip
        if process.returncode == 0:
            return library_path
    raise RuntimeError(f"{command[0]} failed: {process.stderr.strip()[-300:]}")


def processor() -> str:
    """Describe this processor's instruction set, so that two kinds of processor differ."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    features = {line for line in lines if line.startswith(("flags", "Features", "model name", "isa"))}
    return "\n".join([platform.machine(), *sorted(features)])
