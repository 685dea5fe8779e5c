"""Free memory is what the system has, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumice import memory


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_the_system_says(system: Path) -> None:
    assert memory.available_memory() == 4000 * 1024
    (system / "memory.max").write_text("max\n")
    assert memory.available_memory() == 4000 * 1024


def test_a_container_has_a_limit_of_which_a_part_is_used(system: Path) -> None:
    (system / "memory.max").write_text("3000000\n")
    assert memory.available_memory() == 3000000
    (system / "memory.current").write_text("2500000\n")
    assert memory.available_memory() == 500000
    (system / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert memory.available_memory() == 900000
    (system / "memory.max").write_text("2000000\n")
    assert memory.available_memory() == 0
