"""Many processes have one process's losses. Figures, and more numbers: `python benchmarks/processes.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]


def test_copies_and_shards_have_the_losses_of_one_process(
    processes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with and without pictures in a step, a process without a pack, sharded checkpoints."""
    monkeypatch.syspath_prepend(Path(processes.__file__).parent)  # for the processes
    processes.prepare(tmp_path)
    names = ["one", "ddp 2", "fsdp 2", "fsdp 2, then 3"]
    results = processes.spread(tmp_path, names, processes.run_forked)
    # measured worst case of all runs of benchmarks/processes.py: 6.4e-8
    assert all(apart < 1e-6 for apart in results.values()), results
