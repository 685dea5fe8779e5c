"""Recipes are typed and checked when read; every shipped one is read here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pumice.data.rows import Rows
from pumice.errors import InputError
from pumice.train.recipe import NewModel, load_recipe
from pumice.weights.read import find_model

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "examples").glob("*.yaml")])
VALUES: dict[str, Any] = {
    "name": "a",
    "output": "out",
    "model": "folder",
    "stage": {"learn": {"connector": 1e-3}},
    "data": [{"rows": "rows.jsonl"}],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES | changes))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_is_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stage.learn
    if path.parent.name == "examples":
        assert {row.image[0] for row in Rows(ROOT / recipe.data[0].rows)} < set(os.listdir(path.parent))
        find_model(recipe.model)
    elif not isinstance(recipe.model, NewModel):
        # a stage that goes on from another names the model that the other writes
        outputs = {load_recipe(other).output / "model" for other in path.parent.glob("*.yaml")}
        assert recipe.model in outputs


def test_there_are_shipped_recipes() -> None:
    names = [path.name for path in SHIPPED if path.parent.name == "pumice-tiny"]
    assert names == ["0-warm.yaml", "1-align.yaml", "2-instruct.yaml"]


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    overrides = ["seed=3", "stage.learn.connector=0.5", "data.0.weight=0.25", "stage.lora={rank: 4}"]
    overrides.append("stage.learn.lora=0.1")
    recipe = load_recipe(write(tmp_path), overrides)
    assert recipe.seed == 3
    assert recipe.stage.learn == {"connector": 0.5, "lora": 0.1}
    assert recipe.data[0].weight == 0.25
    assert recipe.stage.lora is not None and recipe.stage.lora.rank == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 2}, r"unknown key 'epoch'; did you mean 'epochs'\?"),
        ({"stage": {"learn": {}}}, r"stage: learn names no part"),
        ({"stage": {"learn": {"connector": 0.0}}}, r"the rate 0\.0"),
        ({"stage": {"learn": {"projector": 1e-3}}}, r"unknown key 'stage\.learn\.projector'; .*"),
        ({"batch": 0}, r"batch: .*greater than 0"),
        ({"data": []}, r"data is empty; give one"),
        ({"precision": "fp8"}, r"precision: .*'fp32' or 'bf16'"),
        ({"epochs": float("inf")}, r"epochs: .*finite"),
        ({"stage": {"learn": {"connector": float("nan")}}}, r"stage\.learn\.connector: .*finite"),
        ({"seed": -1}, r"seed: .*greater than or equal to 0"),
        ({"betas": [0.9, 1.5]}, r"betas\.1: .*less than 1"),
        ({"stage": {"lern": {}}}, r"unknown key 'stage\.lern'; did you mean 'learn'\?"),
        ({"stage": {"learn": {"connector": 1e-3}, "lora": {}}}, r"stage: .*add lora to learn"),
        ({"stage": {"learn": {"lora": 1e-3}, "lora": {"targets": ["query"]}}}, r"stage\.lora\.targets\.0: "),
        (
            {"stage": {"learn": {"lora": 1e-3}, "lora": {"targets": []}}},
            r"stage\.lora\.targets is empty",
        ),
        ({"model": {"tower": "a", "decodr": "b"}}, r"unknown key 'model\.decodr'; did you mean 'decoder'\?"),
        ({"model": {"tower": "a"}}, r"model\.decoder is missing"),
        ({"model": 3}, r"model must be a path or a mapping"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write key=value"),
        ("seed.deep=1", "seed: .*valid integer"),
        ("name.deep=1", "no 'deep' to set"),
        ("sead=1", "did you mean 'seed'"),
        ("seed=[1", r"--set seed=\[1: the value is not YAML"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path), [override])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read.*gone\.yaml"):
        load_recipe(tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(InputError, match="holds no recipe"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
