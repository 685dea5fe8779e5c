"""What a pass keeps: checkpointing changes no number, and what is frozen computes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pumice.train.loop import Trainer
from pumice.train.objective import PackTensors
from pumice.train.recipe import load_recipe
from pumice.train.setup import prepare

MakeRecipe = Callable[..., Path]


def trainer(path: Path) -> Trainer:
    torch.manual_seed(0)
    recipe = load_recipe(path)
    return Trainer(recipe, prepare(recipe))


def gradients(found: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(7)  # dropout
    found.model.train()
    [work, *_] = found._prepare(0).works
    loss = found.objective(work)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in found.learned.items() if p.grad is not None}


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of what is kept for the backward pass, parameters left out."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.bytes = 0
        known = {p.data_ptr() for p in parameters}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in known:
                self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def test_checkpointing_changes_memory_and_no_number(make_recipe: MakeRecipe) -> None:
    lora = {"learn": {"connector": 1e-3, "lora": 1e-3}, "lora": {"rank": 2, "dropout": 0.3}}
    found: dict[str, Any] = {}
    for kind in ("none", "selective", "full"):
        made = trainer(make_recipe(kind, stage=lora, checkpointing=kind))
        with torch.no_grad():
            for name, parameter in made.learned.items():
                if name.endswith("lora_b"):
                    parameter.fill_(0.1)  # else nothing passes through the dropout
        found[kind] = gradients(made)
    for kind in ("selective", "full"):
        assert found[kind][0] == found["none"][0]
        for name, gradient in found["none"][1].items():
            assert torch.equal(found[kind][1][name], gradient), (kind, name)
    plain = trainer(make_recipe("p"))
    full = trainer(make_recipe("f", checkpointing="full"))
    sizes = []
    for made in (plain, full):
        [work, *_] = made._prepare(0).works
        kept = Kept(list(made.model.parameters()))
        with kept:
            made.objective(work)
        sizes.append(kept.bytes)
    assert sizes[1] < 0.5 * sizes[0]


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


@pytest.mark.parametrize("learns", ["connector", "decoder"])
def test_frozen_weights_get_no_products_of_their_own(make_recipe: MakeRecipe, learns: str) -> None:
    found = trainer(make_recipe(stage={"learn": {learns: 1e-3}}))
    [work, *_] = found._prepare(0).works
    loss = found.objective(work)
    with Products() as products:
        loss.backward()
    gate = tuple(found.model.decoder.blocks[0].mlp.gate.weight.shape)  # as no weight of the connector
    assert (gate in products.shapes) is (learns == "decoder")
    assert all((p.grad is not None) is p.requires_grad for p in found.model.decoder.parameters())
    assert all(p.grad is None for p in found.model.tower.parameters())


def test_a_tower_that_is_frozen_builds_no_graph(make_recipe: MakeRecipe) -> None:
    found = trainer(make_recipe())
    [work, *_] = found._prepare(0).works
    assert work.pictures
    assert not found.features.look(work.pictures).requires_grad
    learning = trainer(make_recipe("t", stage={"learn": {"tower": 1e-4}}))
    assert learning.features.look(work.pictures).requires_grad


def test_a_dummy_pack_uses_what_learns_and_teaches_nothing(make_recipe: MakeRecipe) -> None:
    found = trainer(make_recipe())
    found.objective.always = True
    loss = found.objective(PackTensors.dummy())
    loss.backward()
    assert loss.item() == 0
    for name, parameter in found.learned.items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_embeddings_learn_at_a_rate_of_their_own(make_recipe: MakeRecipe) -> None:
    apart = trainer(make_recipe(stage={"learn": {"embeddings": 1e-3, "connector": 1e-4}}))
    assert set(apart.learned) == {"decoder.embed.weight"} | {
        name for name, _ in apart.model.named_parameters() if name.startswith("connector.")
    }
    assert [group["part"] for group in apart.optimizer.param_groups] == ["connector", "embeddings"]
    together = trainer(make_recipe("d", stage={"learn": {"decoder": 1e-3}}))
    assert "decoder.embed.weight" in together.learned
