"""Checkpoints of optimisers whose tensors share memory, and of those that count steps in plain numbers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pumice.errors import InputError
from pumice.train import checkpoint as checkpoints
from pumice.train import preflight, run

MakeRecipe = Callable[..., Path]


class EightBit(torch.optim.Optimizer):
    """State as bitsandbytes keeps it: all parameters have the same table, and steps are a number."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.table = torch.linspace(-1, 1, 256)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("step", 0)
                state["step"] += 1
                state.setdefault("state1", torch.zeros(parameter.shape, dtype=torch.uint8))
                state["state1"] += 1
                state["qmap1"] = self.table


def test_tensors_that_share_memory_are_saved_and_restored(tmp_path: Path) -> None:
    trainable = {name: torch.nn.Parameter(torch.randn(3, 4)) for name in ("a", "b")}
    optimizer = EightBit(trainable.values())
    optimizer.step()
    moments, plain = checkpoints.optimizer_state(optimizer, trainable)
    weights = {name: weight.detach() for name, weight in trainable.items()}
    saved = checkpoints.Checkpoint(1, weights, moments, plain, {}, {}, {"tokens": 0, "skipped": {}})
    checkpoints.save(tmp_path, saved, keep_last=1)
    found = checkpoints.latest(tmp_path, {}, trainable, torch.device("cpu"))
    assert found is not None
    other = EightBit(trainable.values())
    checkpoints.restore_optimizer(other, trainable, found)
    for parameter in trainable.values():
        before, after = optimizer.state[parameter], other.state[parameter]
        assert after["step"] == 1 and type(after["step"]) is int
        assert all(torch.equal(before[name], after[name]) for name in ("state1", "qmap1"))
    other.step()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is optional")
def test_adamw8bit_resumes_with_equal_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(optimizer="adamw8bit", max_steps=4, save_every=2, keep_last=9)
    model = run(recipe)
    last = tmp_path / "run" / "checkpoints" / "step-000004"
    whole = load_file(last / "tensors" / "all.safetensors")
    shutil.rmtree(last)
    shutil.rmtree(model)
    run(recipe)
    resumed = load_file(last / "tensors" / "all.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"stage": {"learn": {"lora": 1e-3}, "lora": {"rank": 2}, "base": "nf4"}}, "base: nf4"),
        ({"optimizer": "adamw8bit"}, "optimizer: adamw8bit"),
    ],
)
def test_bitsandbytes_missing_or_old_is_told_before_anything_is_loaded(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], what: str
) -> None:
    def missing(_: str) -> str:
        raise preflight.importlib.metadata.PackageNotFoundError("bitsandbytes")

    monkeypatch.setattr(preflight.importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=f"{what} needs bitsandbytes .*pip install.*needs nothing"):
        run(make_recipe(**changes))
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda _: "0.45.3")
    with pytest.raises(InputError, match=rf"{what} needs bitsandbytes 0.46 or later, 0.45.3 is installed"):
        run(make_recipe(**changes))


def test_bitsandbytes_that_does_not_load_is_told(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda _: "0.46")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match="optimizer: adamw8bit needs bitsandbytes: pip install"):
        run(make_recipe(optimizer="adamw8bit"))
