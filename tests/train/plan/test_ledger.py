"""The memory that `plan` tells of 7B runs, beside a ledger of every allocation of the whole depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from pumice.config import ModelConfig
from pumice.model.layers import rope_inv_freq
from pumice.train.parallel import shard
from pumice.train.plan.estimate import FRAMEWORK, assumed_pack, plan
from pumice.train.plan.footprint import MemoryCounter, PackShape, fake_model, loss_of
from pumice.train.recipe import Recipe, load_recipe
from pumice.train.setup import trainable_parameters
from pumice.train.shapes import shape

ROOT = Path(__file__).parents[3]


class Objective(nn.Module):
    """The objective of a fake model, as DDP or FSDP get it."""

    def __init__(self, recipe: Recipe, config: ModelConfig, pack: PackShape) -> None:
        super().__init__()
        self.model = fake_model(recipe, config, "cuda")
        self.recipe, self.config, self.pack = recipe, config, pack

    def forward(self) -> Tensor:
        return loss_of(self.model, self.recipe, self.config, self.pack)


@pytest.fixture
def eight_processes() -> Iterator[None]:
    """A process group whose other members are not there: each collective gives fake results."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()


class Ledger(MemoryCounter):
    """Count as well what FSDP frees and allocates in place: the storages of gathered parameters."""

    def __enter__(self) -> Ledger:
        from torch.distributed.fsdp._fully_shard import _fsdp_param

        self._functions = {name: getattr(_fsdp_param, name) for name in ("alloc_storage", "free_storage")}

        def counted(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
            def change(tensor: Tensor) -> None:
                before = tensor.untyped_storage().nbytes()
                function(tensor)
                self.add(tensor.untyped_storage().nbytes() - before)

            return change

        for name, function in self._functions.items():
            setattr(_fsdp_param, name, counted(function))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        from torch.distributed.fsdp._fully_shard import _fsdp_param

        super().__exit__(*error)
        for name, function in self._functions.items():
            setattr(_fsdp_param, name, function)


def ledger(recipe: Recipe, config: ModelConfig, pack: PackShape, processes: int) -> int:
    """Return the peak bytes of a step of two packs, with everything that a process holds."""
    rope = (config.decoder.head_dim, config.decoder.rope_theta, config.decoder.rope_scaling)
    rope_inv_freq(*rope, torch.device("cpu"))  # not a fake one, which would stay in this function's cache
    mesh = init_device_mesh("cpu", (processes,)) if processes > 1 else None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        objective = Objective(recipe, config, pack)
        model = objective.model
        if mesh is not None:
            shard(objective, model.decoder.blocks, [model.tower], mesh)
        held = {tensor.untyped_storage()._cdata: tensor for tensor in _local(objective)}
        before = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
        with Ledger(held.values()) as count:
            learning = trainable_parameters(model, recipe.stage.learn).values()
            moments = [torch.zeros_like(p, requires_grad=False) for p in [*learning, *learning]]
            for _ in range(2):
                objective().backward()
            assert moments
    return before + count.peak


def _local(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor.to_local() if hasattr(tensor, "to_local") else tensor


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "full": ("2-instruct-7b.yaml", {}, 8),
    "LoRA": ("2-lora-7b.yaml", {"pack_tokens": 2048, "checkpointing": "full"}, 1),
    "QLoRA": ("2-qlora-7b.yaml", {"pack_tokens": 2048, "checkpointing": "full"}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_tells_what_a_7b_run_allocates(name: str, request: pytest.FixtureRequest) -> None:
    file, changes, processes = CASES[name]
    if processes > 1:
        request.getfixturevalue("eight_processes")
    path = ROOT / "recipes" / "llava-1.5" / file
    recipe = load_recipe(path, [f"{key}={value}" for key, value in changes.items()])
    if recipe.stage.base == "nf4":  # bitsandbytes computes on real tensors only
        recipe = recipe.model_copy(update={"stage": recipe.stage.model_copy(update={"base": "int8"})})
    config, _ = shape(recipe, path)
    estimate = plan(recipe, path, gpu="a100-80g", processes=processes)
    assert estimate.sharded is (processes > 1)
    tower = estimate.memory["picture"]  # runs before the step, and is measured by itself
    allocated = ledger(recipe, config, assumed_pack(recipe, config), processes)
    planned = estimate.total - FRAMEWORK["cuda"] - tower
    # measured:
    assert planned == pytest.approx(allocated, rel=0.1), (estimate.memory, allocated)
