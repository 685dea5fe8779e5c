"""Free memory is what the system has, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice.storage import memory
from pumice.storage.memory import ram


@pytest.fixture
def system(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n")
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    return tmp_path


def test_the_system_says(system: Path) -> None:
    assert ram(system) == (9000 * 1024, 4000 * 1024)
    (system / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert ram(system) == (9000 * 1024, 4000 * 1024)


def test_a_container_has_a_limit_of_which_a_part_is_used(system: Path) -> None:
    cgroup = system / "sys" / "fs" / "cgroup"
    (cgroup / "memory.max").write_text("3000000\n")
    assert ram(system) == (3000000, 3000000)
    (cgroup / "memory.current").write_text("2500000\n")
    assert ram(system) == (3000000, 500000)
    (cgroup / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert ram(system) == (3000000, 900000)
    (cgroup / "memory.max").write_text("2000000\n")
    assert ram(system) == (2000000, 0)


def test_a_job_has_the_least_of_its_own_limit_and_of_those_above(system: Path) -> None:
    """As Slurm and systemd set them. The machine's topmost group has none."""
    (system / "proc/self").mkdir()
    (system / "proc/self/cgroup").write_text("0::/system.slice/job_7/step_0\n")
    step = system / "sys/fs/cgroup/system.slice/job_7/step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step.parent / "memory.max").write_text("3000000\n")
    (step.parent / "memory.current").write_text("1000000\n")
    assert ram(system) == (3000000, 2000000)
    (step / "memory.max").write_text("5000000\n")
    (step / "memory.current").write_text("3500000\n")
    assert ram(system) == (3000000, 1500000)


def test_cgroups_of_version_1(system: Path) -> None:
    (system / "proc/self").mkdir()
    (system / "proc/self/cgroup").write_text("5:devices:/a\n4:cpu,memory:/docker/7\n0::/\n")
    top = system / "sys/fs/cgroup/memory"
    top.mkdir()
    (top / "memory.limit_in_bytes").write_text("3000000\n")  # the container's own, at the top of what it sees
    assert ram(system) == (3000000, 3000000)
    (top / "docker/7").mkdir(parents=True)
    (top / "docker/7/memory.limit_in_bytes").write_text("2000000\n")
    (top / "docker/7/memory.usage_in_bytes").write_text("500000\n")
    assert ram(system) == (2000000, 1500000)


def test_the_addresses_of_a_process_may_be_limited(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "proc/self").mkdir()
    (system / "proc/self/status").write_text("Name:\tpython\nVmSize:\t  1000 kB\n")
    monkeypatch.setattr(memory, "_address_limit", lambda: 3000 * 1024)
    assert ram(system) == (9000 * 1024, 2000 * 1024)
