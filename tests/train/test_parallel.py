"""Many processes have one process's losses, and a run that is killed one that is left alone.

Figures and more numbers of processes: `python benchmarks/processes.py`.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module")
def prepared(processes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    processes.prepare(folder)
    return folder


def test_copies_and_shards_have_the_losses_of_one_process(processes: ModuleType, prepared: Path) -> None:
    """Rows with and without pictures in a step, a process without a pack, sharded checkpoints."""
    names = ["one", "ddp 2", "fsdp 2", "fsdp 2, then 3"]
    found = processes.spread(prepared, names)
    # measured worst case of DDP on 2 and FSDP2 on 2 and 4: 6.4e-8
    assert all(apart < 1e-6 for apart in found.values()), found


def test_killed_twice_and_the_same_to_the_bit(processes: ModuleType, prepared: Path) -> None:
    kills, same = processes.kill(prepared, times=2)
    assert kills == 2 and same
