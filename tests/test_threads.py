"""The cores that may be used are counted, and fewer threads compute beside other busy programs."""

from __future__ import annotations

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
