"""Many processes have one process's losses. Figures, and more numbers: `python benchmarks/processes.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pumice.data.convert import convert
from pumice.data.rows import ImageFinder, Rows
from pumice.errors import InputError
from pumice.train.loop import Trainer
from pumice.train.parallel import World
from pumice.train.plan.estimate import plan
from pumice.train.recipe import Recipe, load_recipe
from pumice.train.setup import prepare

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no gloo"),
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]


def recipe(**changes: Any) -> Recipe:
    values = {"name": "a", "output": "o", "model": "m", "data": [{"rows": "r"}]}
    return Recipe.model_validate(values | {"stage": {"learn": {"decoder": 1e-3}}} | changes)


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


def test_four_processes_learn_adapters_on_int8_with_packs_without_pictures(
    processes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps. A gradient must pass the same blocks in every process, or the run hangs."""
    monkeypatch.syspath_prepend(Path(processes.__file__).parent)
    processes.prepare(tmp_path)
    results = processes.spread(tmp_path, ["one", "fsdp 4"], processes.run_forked, **processes.ADAPTERS)
    assert results["fsdp 4"] < 1e-6, results


def test_shards_take_the_gradients_of_each_pack(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Else every process would hold whole gradients until the last pack of a step."""
    recipe, world = load_recipe(make_recipe()), World(kind="fsdp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        run = Trainer(recipe, prepare(recipe, load_on=world.load_on), world)
        [pack, *_] = run._prepare_step(0).packs
        with world.accumulate(last=False):
            run.wrapped_objective(pack).backward()
        assert [name for name, p in run.trainable.items() if p.grad is None] == []
    finally:
        torch.distributed.destroy_process_group()


def test_streamed_rows_stay_in_their_steps_with_any_number_of_processes(
    processes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet and tars, in blocks: two processes, and three that go on from them, have one's losses."""
    pytest.importorskip("pyarrow")
    monkeypatch.syspath_prepend(Path(processes.__file__).parent)
    processes.prepare(tmp_path)
    rows, data = Rows(tmp_path / "mixed.jsonl"), []
    for form in ("parquet", "webdataset"):
        convert(rows, tmp_path / form, form, ImageFinder(tmp_path), rows_per_file=10)
        data.append({"rows": str(tmp_path / form)})
    names = ["one", "ddp 2", "ddp 2, then 3"]
    results = processes.spread(tmp_path, names, processes.run_forked, data=data, shuffle_block=4)
    assert all(apart < 1e-6 for apart in results.values()), results  # measured: 6.7e-8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": {"learn": {"lora": 1e-3}, "lora": {}, "base": "nf4"}}, "base: nf4 cannot be sharded"),
        ({"optimizer": "adamw8bit"}, "adamw8bit keeps its states whole"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes: dict[str, Any], message: str) -> None:
    world = World(0, 2, 0, "fsdp")
    with pytest.raises(InputError, match=message):
        world.choose_kind(recipe(**changes), 1e9, torch.device("cpu"))


def test_a_plan_refuses_what_cannot_be_sharded() -> None:
    path = Path(__file__).parents[2] / "recipes/llava-1.5/2-qlora-7b.yaml"
    with pytest.raises(InputError, match="base: nf4 cannot be sharded"):
        plan(load_recipe(path, ["parallel=fsdp", "pack_tokens=1024"]), path, gpu="a100-80g", processes=8)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match=r"4 processes on this machine and 2 GPUs; .* --nproc-per-node 2"):
        World.join(recipe())


def test_one_gpu_for_all_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(InputError, match="device: cuda:1 is one GPU, torchrun started 4 processes"):
        World.join(recipe(device="cuda:1"))


def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL ends a group with all its members, and they wait in a step for the one that fails."""
    calls: list[str] = []
    group = SimpleNamespace(WORLD=SimpleNamespace(abort=lambda: calls.append("abort")))
    monkeypatch.setattr(torch.distributed, "group", group)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("destroy"))
    with pytest.raises(InputError), World(0, 2):
        raise InputError("a bad row")
    assert calls == ["abort"]
    with World(0, 2):
        pass
    assert calls == ["abort", "destroy"]
