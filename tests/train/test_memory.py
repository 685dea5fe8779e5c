"""Activation checkpointing changes no number, and frozen weights compute no gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pumice.train.loop import Trainer
from pumice.train.objective import PackTensors
from pumice.train.recipe import load_recipe
from pumice.train.setup import prepare

MakeRecipe = Callable[..., Path]


def make_trainer(path: Path) -> Trainer:
    torch.manual_seed(0)
    recipe = load_recipe(path)
    return Trainer(recipe, prepare(recipe))


def gradients(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(7)  # dropout
    trainer.model.train()
    [pack, *_] = trainer._prepare_step(0).packs
    loss = trainer.objective(pack)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.trainable.items() if p.grad is not None}


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that are saved for the backward pass, parameters left out."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.bytes = 0
        parameter_addresses = {p.data_ptr() for p in parameters}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in parameter_addresses:
                self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def test_checkpointing_changes_memory_and_no_number(make_recipe: MakeRecipe) -> None:
    lora = {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 2, "dropout": 0.3}}
    results: dict[str, Any] = {}
    for kind in ("none", "selective", "full"):
        run = make_trainer(make_recipe(kind, stage=lora, checkpointing=kind))
        with torch.no_grad():
            for name, parameter in run.trainable.items():
                if name.endswith("lora_b"):
                    parameter.fill_(0.1)  # else nothing passes through the dropout
        results[kind] = gradients(run)
    for kind in ("selective", "full"):
        assert results[kind][0] == results["none"][0]
        for name, gradient in results["none"][1].items():
            assert torch.equal(results[kind][1][name], gradient), (kind, name)
    plain = make_trainer(make_recipe("p"))
    full = make_trainer(make_recipe("f", checkpointing="full"))
    sizes = []
    for run in (plain, full):
        [pack, *_] = run._prepare_step(0).packs
        saved = SavedBytes(list(run.model.parameters()))
        with saved:
            run.objective(pack)
        sizes.append(saved.bytes)
    assert sizes[1] < 0.5 * sizes[0]


def test_compiled_parts_give_the_same_loss_and_gradients(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by the compiler, without the minutes that its code generator takes."""
    lora = {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 2}}
    loss, plain = gradients(make_trainer(make_recipe("plain", stage=lora)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run = make_trainer(make_recipe("compiled", stage=lora, compile=True))
    compiled_loss, compiled = gradients(run)
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


def test_packs_of_other_lengths_are_not_compiled_again(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()  # other tests compiled the same code
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run = make_trainer(make_recipe(compile=True, batch=1))
    run.model.train()
    lengths, compiled = set[int](), list[int]()
    for step in range(3):
        for pack in run._prepare_step(step).packs:
            run.objective(pack).backward()
            lengths.add(len(pack.input_ids))
            compiled.append(len(graphs))
    assert len(lengths) == 3
    # Once for all blocks: the norm, projections with rotary positions, the MLP with its norm and residuals.
    assert compiled == [3] * len(compiled)


class Products(TorchDispatchMode):
    """The matrix products that run, by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.partition(".")[0] in ("mm", "addmm"):
            self.shapes.append(tuple(result.shape))
        return result


class Conversions(TorchDispatchMode):
    """The copies in bf16 of matrices of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.copies = shape, list[StorageWeakRef]()

    def alive(self) -> int:
        return sum(not copy.expired() for copy in self.copies)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        converts = func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16
        if converts and result.shape == self.shape:
            self.copies.append(StorageWeakRef(result.untyped_storage()))
        return result


def test_weights_in_bf16_are_freed_during_the_forward_pass(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast's cache would keep the whole model in bf16 until the end of the pass."""
    run = make_trainer(make_recipe(precision="bf16", checkpointing="full"))
    [pack, *_] = run._prepare_step(0).packs
    plain, alive = run.objective.loss, list[int]()
    with Conversions(run.model.decoder.blocks[0].mlp.gate.weight.shape) as conversions:

        def watched(*arguments: Any) -> torch.Tensor:
            alive.append(conversions.alive())
            return plain(*arguments)

        monkeypatch.setattr(run.objective, "loss", watched)
        run.objective(pack)
    assert len(conversions.copies) == 4  # gate and up of two blocks
    assert alive == [0]


@pytest.mark.parametrize("learns", ["connector", "decoder"])
def test_frozen_weights_get_no_products_of_their_own(make_recipe: MakeRecipe, learns: str) -> None:
    run = make_trainer(make_recipe(stage={"learn": {learns: 1e-3}}))
    [pack, *_] = run._prepare_step(0).packs
    loss = run.objective(pack)
    with Products() as products:
        loss.backward()
    gate = tuple(run.model.decoder.blocks[0].mlp.gate.weight.shape)  # as no weight of the connector
    assert (gate in products.shapes) is (learns == "decoder")
    assert all((p.grad is not None) is p.requires_grad for p in run.model.decoder.parameters())
    assert all(p.grad is None for p in run.model.tower.parameters())


def test_a_tower_that_is_frozen_builds_no_graph(make_recipe: MakeRecipe) -> None:
    run = make_trainer(make_recipe())
    [pack, *_] = run._prepare_step(0).packs
    assert pack.images
    assert not run.features.encode(pack.images).requires_grad
    learning = make_trainer(make_recipe("t", stage={"learn": {"tower": 1e-4}}))
    assert learning.features.encode(pack.images).requires_grad


def test_a_dummy_pack_uses_what_learns_and_teaches_nothing(make_recipe: MakeRecipe) -> None:
    run = make_trainer(make_recipe())
    run.objective.use_all_parts = True
    loss = run.objective(PackTensors.dummy())
    loss.backward()
    assert loss.item() == 0
    for name, parameter in run.trainable.items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_embeddings_learn_at_a_rate_of_their_own(make_recipe: MakeRecipe) -> None:
    apart = make_trainer(make_recipe(stage={"learn": {"embeddings": 1e-3, "connector": 1e-4}}))
    assert set(apart.trainable) == {"decoder.embed.weight"} | {
        name for name, _ in apart.model.named_parameters() if name.startswith("connector.")
    }
    assert [group["part"] for group in apart.optimizer.param_groups] == ["connector", "embeddings"]
    together = make_trainer(make_recipe("d", stage={"learn": {"decoder": 1e-3}}))
    assert "decoder.embed.weight" in together.trainable
