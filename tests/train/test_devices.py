"""Defaults and numerics that depend on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pumice.errors import WorkError
from pumice.train.devices import PACK_TOKENS, for_device, numerics, peak
from pumice.train.loop import Trainer, train
from pumice.train.objective import Objective
from pumice.train.recipe import Recipe, load_recipe


def recipe(**changes: Any) -> Recipe:
    values = {"name": "a", "output": "o", "model": "m", "data": [{"rows": "r"}]}
    return Recipe.model_validate(values | {"stage": {"learn": {"decoder": 1e-3}}} | changes)


def test_packs_are_longer_on_a_gpu_unless_the_recipe_says_how_long() -> None:
    assert for_device(recipe(), "cuda").pack_tokens == PACK_TOKENS == 8192
    assert for_device(recipe(pack_tokens=512), "cuda").pack_tokens == 512
    assert for_device(recipe(), "cpu").pack_tokens == 1024


def test_deterministic_is_written_only_where_it_is_asked_for() -> None:
    assert "deterministic" not in recipe().stored()
    assert recipe(deterministic=True).stored()["deterministic"] is True


def test_timing_a_device_draws_no_number_of_the_run() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert peak(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cpu_keeps_the_numerics_of_the_process() -> None:
    with numerics(recipe(deterministic=True, precision="tf32"), torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"


class Full(Objective):
    """An objective for which the memory of a GPU does not suffice."""

    def loss(self, *_: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class FullTrainer(Trainer):
    objective_class = Full


def test_a_full_gpu_is_told_in_words(make_recipe: Callable[..., Path]) -> None:
    said = "the GPU's memory does not suffice for packs of 64 tokens; set checkpointing: full to"
    with pytest.raises(WorkError, match=said):
        train(load_recipe(make_recipe(pack_tokens=64)), FullTrainer)
    with pytest.raises(WorkError, match="64 tokens; start again with pack_tokens: 32 in another"):
        train(load_recipe(make_recipe(pack_tokens=64, checkpointing="full")), FullTrainer)
