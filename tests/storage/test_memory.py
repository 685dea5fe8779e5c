"""Free memory is what the system has, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

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
