"""The cores that may be used are counted, and fewer threads compute beside other busy programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pumice import threads as threads_module
from pumice.threads import usable_cores


def test_a_container(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1


def test_an_older_container(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/cpu"
    group.mkdir(parents=True)
    (group / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("150000", 2), ("-1", usable_cores(tmp_path))):
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert usable_cores(tmp_path) == min(cores, usable_cores(tmp_path / "none"))


@pytest.mark.parametrize(
    ("load", "threads", "fewer"),
    [(2.9, 4, None), (3.2, 2, 1), (3.2, 1, None), (9.0, 4, 1), (6.5, 8, 1)],
)
def test_beside_busy_programs_fewer_threads_compute(
    monkeypatch: pytest.MonkeyPatch, load: float, threads: int, fewer: int | None
) -> None:
    monkeypatch.setattr(threads_module, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads_module, "busy_load", lambda: load)
    assert threads_module.fewer_threads(threads) == fewer


ASKED = """
import logging, os, sys
import pumice.threads
pumice.threads.busy_load = lambda: {load}
{first}
assert pumice.load and pumice.Assistant
print(os.environ.get("OMP_WAIT_POLICY"))
"""
TORCH = "import torch; torch.set_num_threads(2); torch.cuda.is_available = lambda: False"


@pytest.mark.parametrize(
    ("first", "load", "given", "policy", "warnings"),
    [
        ("", 1e9, None, "PASSIVE", 0),
        ("", 0.0, None, "None", 0),
        ("", 1e9, "ACTIVE", "ACTIVE", 0),
        (TORCH, 1e9, None, "None", 1),
        (TORCH, 1e9, "ACTIVE", "ACTIVE", 0),
    ],
)
def test_threads_of_python_sleep_beside_busy_programs(
    first: str, load: float, given: str | None, policy: str, warnings: int
) -> None:
    """Looked at in a process of its own: OpenMP reads it as torch is imported."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", ASKED.format(first=first, load=load)],
        env=environment | ({} if given is None else {"OMP_WAIT_POLICY": given}),
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == policy
    assert done.stderr.count("OMP_WAIT_POLICY=PASSIVE is set before") == warnings
