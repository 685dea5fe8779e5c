"""Free memory is what the system has, within a container's limit."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from pumice.storage import memory
from pumice.storage.memory import available_memory


@pytest.fixture
def system(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n")
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    return tmp_path


def test_the_system_says(system: Path) -> None:
    assert available_memory(system) == 4000 * 1024
    (system / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available_memory(system) == 4000 * 1024


def test_a_container_has_a_limit_of_which_a_part_is_used(system: Path) -> None:
    cgroup = system / "sys" / "fs" / "cgroup"
    (cgroup / "memory.max").write_text("3000000\n")
    assert available_memory(system) == 3000000
    (cgroup / "memory.current").write_text("2500000\n")
    assert available_memory(system) == 500000
    (cgroup / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert available_memory(system) == 900000
    (cgroup / "memory.max").write_text("2000000\n")
    assert available_memory(system) == 0


SLURM, DOCKER = "0::/job/step\n", "5:devices:/a\n4:cpu,memory:/7\n0::/\n"  # versions 2 and 1


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # The machine's topmost group has no limit, and a step may have none.
        (
            SLURM,
            {"job/step/memory.max": "max", "job/memory.max": 9000, "job/memory.current": 2000},
            7000,
        ),
        (
            SLURM,
            {"job/step/memory.max": 9000, "job/step/memory.current": 8500, "job/memory.max": 5000},
            500,
        ),
        # A container's own group may be at the top of what it sees.
        (DOCKER, {"memory/memory.limit_in_bytes": 9000}, 9000),
        (
            DOCKER,
            {
                "memory/memory.limit_in_bytes": 9000, "memory/7/memory.limit_in_bytes": 5000,
                "memory/7/memory.usage_in_bytes": 500,
            },
            4500,
        ),
    ],
)  # fmt: skip
def test_a_job_has_the_least_of_its_own_limit_and_of_those_above(
    system: Path, groups: str, files: dict[str, object], expected: int
) -> None:
    (system / "proc/self").mkdir()
    (system / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = system / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert available_memory(system) == expected


def test_the_addresses_of_a_process_may_be_limited(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "proc/self").mkdir()
    (system / "proc/self/status").write_text("Name:\tpython\nVmSize:\t  1000 kB\n")
    monkeypatch.setattr(memory, "_address_limit", lambda: 3000 * 1024)
    assert available_memory(system) == 2000 * 1024


def test_a_system_without_proc_says_it_by_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = types.SimpleNamespace(total=9000, available=4000)
    library = types.SimpleNamespace(virtual_memory=lambda: sizes)
    monkeypatch.setitem(sys.modules, "psutil", library)
    assert available_memory(tmp_path) == 4000
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert available_memory(tmp_path) is None
