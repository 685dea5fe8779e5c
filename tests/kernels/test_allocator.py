"""Freed memory stays with the process, unless the user's settings forbid it. Each test starts a process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from pathlib import Path
import torch
from pumice.kernels.allocator import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

results = ({calls})
tensors = [torch.ones(1 << 20) for _ in range(30)]  # 4 MB each
before = resident()
del tensors
print(*results, (before - resident()) / 120 / 2**20)  # the share that was given back
"""
GLIBC = platform.libc_ver()[0] == "glibc"


def run(calls: str, script: str = SCRIPT, **environment: str) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", script.format(calls=calls)],
        env={"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path)), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return process.stdout.split()


@pytest.mark.skipif(not GLIBC, reason="only glibc's malloc has these settings")
def test_what_is_kept_is_not_mapped_again() -> None:
    assert float(run("()")[0]) > 0.8
    for calls in ("keep_freed_memory(256 << 20),", "keep_freed_memory(),"):
        result, given_back = run(calls)
        assert result == "True"
        assert float(given_back) < 0.2, calls


@pytest.mark.skipif(not GLIBC, reason="only glibc's malloc has these settings")
def test_less_is_not_kept_after_more() -> None:
    first, then, given_back = run("keep_freed_memory(256 << 20), keep_freed_memory(0)")
    assert (first, then) == ("True", "True")
    assert float(given_back) < 0.2


def test_settings_of_the_user_stand() -> None:
    assert run("keep_freed_memory(),", MALLOC_ARENA_MAX="2")[0] == "False"


@pytest.mark.skipif(not GLIBC, reason="only glibc's malloc has this function")
def test_what_is_free_between_tensors_is_returned() -> None:
    script = """
import resource
from pathlib import Path
import torch
from pumice.kernels.allocator import keep_freed_memory, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

keep_freed_memory()
tensors = [torch.ones(1 << 20) for _ in range(30)]
before = resident()
del tensors[::2]
kept = before - resident()
return_freed_memory()
print(kept / 60 / 2**20, (before - resident()) / 60 / 2**20)
"""
    kept, returned = run("", script)
    assert float(kept) < 0.2
    assert float(returned) > 0.8
