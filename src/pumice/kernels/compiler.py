"""C code into a library for this machine's processor, by the C compiler that it has."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
# Without OpenMP it serves where PyTorch has one thread, too.
TRIED = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


def compile_library(command: list[str], sources: list[Path], target: Path) -> Path:
    """One library of C files, made for the processor as well as the compiler knows it."""
    # PyTorch's own OpenMP comes first, by whatever name: two of them would spin on the same cores.
    packages = Path(torch.__file__).parents[1]
    runtime = [
        str(p) for at in ("torch/lib", "torch.libs") for p in sorted(packages.glob(f"{at}/libgomp*.so*"))
    ]
    for extra in TRIED:
        libraries = runtime if "-fopenmp" in extra else []
        done = subprocess.run(
            [*command, *FLAGS, *extra, *map(str, sources), *libraries, "-o", str(target), "-lm"],
            capture_output=True, text=True, errors="replace", timeout=120, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return target
    raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")


def processor() -> str:
    """What tells this processor's abilities from another's."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    told = {line for line in lines if line.startswith(("flags", "Features", "model name", "isa"))}
    return "\n".join([platform.machine(), *sorted(told)])
