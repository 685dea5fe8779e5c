"""Recipes are typed and checked when read, with what they extend; tests/recipes reads the shipped ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pumice.config import DecoderConfig, ImagePolicy, ModelConfig
from pumice.errors import InputError
from pumice.train.recipe import Recipe, load_recipe, recipe_path
from pumice.train.shapes import shape

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
        ({"zzz": 2}, r"unknown key 'zzz'; remove it, or update Pumice if a newer version wrote it"),
        (
            {"stage": {"learn": {"connector": 1e-3}, "zzz": 1}},
            r"unknown key 'stage\.zzz'; remove it, or update",
        ),
        ({"data": [{"rows": "r", "zzz": 1}]}, r"unknown key 'data\.0\.zzz'; remove it, or update"),
        ({"model": {"base": "m", "connector": {}, "zzz": 1}}, r"unknown key 'model\.zzz'; remove it, or"),
        ({"stage": {"learn": {}}}, r"stage: learn names no part"),
        ({"stage": {"learn": {"connector": 0.0}}}, r"the rate 0\.0"),
        ({"stage": {"learn": {"projector": 1e-3}}}, r"unknown key 'stage\.learn\.projector'; .*"),
        ({"stage": {"learn": {"decoder.3-1": 1e-3}}}, r"decoder\.3-1: the first block comes after the last"),
        (
            {"stage": {"learn": {"lora": 1e-3, "decoder.0-1": 1e-3}, "base": "int8"}},
            r"base: int8 freezes the LLM; take decoder",
        ),
        ({"batch": 0}, r"batch: .*greater than 0"),
        ({"data": []}, r"data is empty; give one"),
        ({"precision": "fp8"}, r"precision: .*'fp32', 'tf32' or 'bf16'"),
        ({"epochs": float("inf")}, r"epochs: .*finite"),
        ({"stage": {"learn": {"connector": float("nan")}}}, r"stage\.learn\.connector: .*finite"),
        ({"seed": -1}, r"seed: .*greater than or equal to 0"),
        ({"betas": [0.9, 1.5]}, r"betas\.1: .*less than 1"),
        ({"stage": {"lern": {}}}, r"unknown key 'stage\.lern'; did you mean 'stage\.learn'\?"),
        ({"stage": {"learn": {"connector": 1e-3}, "lora": {}}}, r"stage: .*add lora to learn"),
        ({"stage": {"learn": {"lora": 1e-3}, "lora": {"targets": ["query"]}}}, r"stage\.lora\.targets\.0: "),
        (
            {"stage": {"learn": {"lora": 1e-3}, "lora": {"targets": []}}},
            r"stage\.lora\.targets is empty",
        ),
        (
            {"model": {"tower": "a", "decodr": "b"}},
            r"unknown key 'model\.decodr'; did you mean 'model\.decoder'\?",
        ),
        ({"model": {"tower": "a"}}, r"model\.decoder is missing"),
        ({"model": 3}, r"model must be a path or a mapping"),
        ({"stage": {"learn": {"connector": 1e-3}, "base": "int8"}}, r"base: int8 .*add lora to learn"),
        (
            {"stage": {"learn": {"lora": 1e-3, "decoder": 1e-3}, "base": "nf4"}},
            r"base: nf4 freezes the LLM; take decoder",
        ),
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
        ("name.deep=1", "no 'deep' to set, as name is '[^']+' and has no keys; write it as a mapping"),
        ("name.deep.er=1", "no 'deep' to set, as name is '[^']+' and has no keys; write it as a mapping"),
        ("sead=1", "did you mean 'seed'"),
        ("lora.rank=4", r"^--set lora\.rank=4: unknown key 'lora\.rank'; did you mean 'stage\.lora\.rank'\?"),
        ("lora.r=4", r"^--set lora\.r=4: unknown key 'lora\.r'; did you mean 'stage\.lora'\?"),
        ("save.every=4", r"^--set save\.every=4: unknown key 'save\.every'; did you mean 'save_every'\?"),
        ("lr=1e-4", r"unknown key 'lr'; did you mean 'stage\.learn'\?"),
        ("stage.learn.vision=1", r"unknown key 'stage\.learn\.vision'; the parts are .*tower.*lora"),
        ("stage.lora=4", r"stage\.lora must be a mapping of keys to values"),
        ("data.rows=x", r"data is a list of 1; say which, as data\.0"),
        ("extends=pumice:finetune", "extends can be set in the recipe's file only"),
        ("stage.rank=4", r"unknown key 'stage\.rank'; did you mean 'stage\.lora\.rank'\?"),
        ("data.0.rwos=x", r"unknown key 'data\.0\.rwos'; did you mean 'data\.0\.rows'\?"),
        ("stage.learn.conector=1", r"did you mean 'stage\.learn\.connector'\?"),
        ("seed=[1", r"--set seed=\[1: the value is not YAML"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path), [override])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the recipe .*gone\.yaml: .*; check the path$"):
        load_recipe(tmp_path / "gone.yaml")
    (tmp_path / "mine.yaml").write_text("name: mine")
    with pytest.raises(InputError, match=r"mine\.yml: there is no such file; did you mean .*/mine\.yaml\?$"):
        load_recipe(tmp_path / "mine.yml")
    with pytest.raises(InputError, match=r"one that Pumice brings is named pumice:finetune$"):
        load_recipe(tmp_path / "finetune")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(InputError, match="holds no recipe"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def extend(folder: Path, name: str, **values: Any) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def test_extending_merges_mappings_replaces_the_rest_and_null_takes_away(tmp_path: Path) -> None:
    stage = {"learn": {"connector": 1e-3, "decoder": 1e-3}, "template": "plain"}
    write(tmp_path, stage=stage, pictures=["a", "b"], batch=7, betas=[0.8, 0.9])
    learn = {"decoder": None, "lora": 2e-4}
    extend(tmp_path, "sub/middle.yaml", extends="../recipe.yaml", stage={"learn": learn, "lora": {"rank": 4}})
    last = extend(tmp_path, "sub/last.yaml", extends="middle.yaml", pictures=["c"], stage={"template": None})
    recipe = load_recipe(last, ["stage.lora.rank=8"])
    assert recipe.stage.learn == {"connector": 1e-3, "lora": 2e-4} and recipe.stage.template is None
    assert recipe.stage.lora is not None and recipe.stage.lora.rank == 8
    assert (recipe.pictures, recipe.batch, recipe.betas) == ([Path("c")], 7, (0.8, 0.9))


def test_a_mapping_of_a_new_model_gives_way_to_a_path(tmp_path: Path) -> None:
    write(tmp_path, model={"tower": "t", "decoder": "d"})
    assert load_recipe(extend(tmp_path, "b.yaml", extends="recipe.yaml", model="m/model")).model == Path(
        "m/model"
    )


@pytest.mark.parametrize(
    ("base", "over", "message"),
    [
        ({"stage": {"learn": {"connector": 1e-3}, "tempalte": "plain"}}, {}, r"recipe\.yaml: unknown key"),
        (
            {},
            {"stage": {"tempalte": "plain"}},
            r"over\.yaml: unknown key 'stage\.tempalte'.*'stage\.template'",
        ),
        ({}, {"sead": None}, r"over\.yaml: unknown key 'sead'; did you mean 'seed'"),
        ({"batch": 0}, {}, r"recipe\.yaml: batch"),
        ({"batch": 0}, {"batch": -1}, r"over\.yaml: batch"),
    ],
)
def test_a_mistake_is_told_of_the_file_that_makes_it(
    tmp_path: Path, base: dict[str, Any], over: dict[str, Any], message: str
) -> None:
    write(tmp_path, **base)
    with pytest.raises(InputError, match=message):
        load_recipe(extend(tmp_path, "over.yaml", extends="recipe.yaml", **over))


def test_extending_in_a_circle_or_nothing_is_refused(tmp_path: Path) -> None:
    extend(tmp_path, "a.yaml", extends="b.yaml")
    extend(tmp_path, "b.yaml", extends="c.yaml")
    extend(tmp_path, "c.yaml", extends="a.yaml")
    with pytest.raises(InputError, match=r"circle, a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(InputError, match=r"lone\.yaml: extends gone\.yaml, but there is no"):
        load_recipe(extend(tmp_path, "lone.yaml", extends="gone.yaml"))
    extend(tmp_path, "parts/base.yaml")
    extend(tmp_path, "parts/b.yaml")
    near = "; did you mean parts/base.yaml?"
    for name, hint in (("parts/bse.yml", near), ("parts/base", near), ("parts/other.yaml", "")):
        with pytest.raises(InputError) as caught:
            load_recipe(extend(tmp_path, "lone.yaml", extends=name))
        assert str(caught.value).endswith(f"there is no {tmp_path / name}{hint}")
    extend(tmp_path, "parts.yaml")  # a name like that of the folder
    for value in (["a.yaml", "b.yaml"], "", "."):
        with pytest.raises(InputError, match=r"extends must be the path of one recipe"):
            load_recipe(extend(tmp_path, "parts/two.yaml", extends=value))


def test_a_stage_has_its_own_pictures_and_context() -> None:
    config = ModelConfig(DecoderConfig(64, 16, 1, 2, 2, 8, 16, context=128), image=ImagePolicy("pad"))
    stage = {"learn": {"connector": 1e-3}, "image": {"mode": "crop"}, "template": "plain"}
    staged = Recipe.model_validate(VALUES | {"stage": stage, "context": 64}).stage_config(config)
    assert (staged.image.mode, staged.template, staged.decoder.context) == ("crop", "plain", 64)
    assert staged.image.mean == config.image.mean
    for changes, message in (
        ({"context": 256}, "context: 256 tokens, the LLM takes 128"),
        ({"stage": stage | {"image": {"moed": "crop"}}}, "stage.image: unknown key 'moed'"),
        (
            {"stage": stage | {"image": {"mode": "anyres", "pinpoints": [[256, 512]]}}},
            "tiles need the model's image_newline",
        ),
    ):
        with pytest.raises(InputError, match=message):
            Recipe.model_validate(VALUES | changes).stage_config(config)


def test_a_misspelt_key_is_named_although_a_needed_one_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, outpt="o")
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith("output"))
    )
    with pytest.raises(InputError, match=r"unknown key 'outpt'; did you mean 'output'\?"):
        load_recipe(path)


def test_setting_below_what_is_null(tmp_path: Path) -> None:
    stage = {"learn": {"lora": 1e-3}, "lora": None}
    recipe = load_recipe(write(tmp_path, stage=stage), ["stage.lora.rank=4"])
    assert recipe.stage.lora is not None and recipe.stage.lora.rank == 4


def test_a_shipped_recipe_is_extended_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(extend(tmp_path, "mine.yaml", extends="pumice:finetune", model="m", epochs=2))
    assert (recipe.name, recipe.model, recipe.epochs) == ("fine-tuning", Path("m"), 2)
    assert load_recipe("pumice:llava-1.5/2-lora-7b").stage.lora is not None
    for name, hint in (
        ("finetun", r"did you mean pumice:finetune\?"),
        ("finetune.yaml", r"did you mean pumice:finetune\?"),
        ("2-lora-7b", r"did you mean pumice:llava-1\.5/2-lora-7b\?"),
        ("qlora", r"did you mean pumice:llava-1\.5/2-qlora-13b or pumice:llava-1\.5/2-qlora-7b\?"),
        ("nothing", r"it brings boxes, finetune, llava-1\.0/1-align-13b, .*small/smolvlm$"),
    ):
        message = rf"mine\.yaml: extends pumice:{name}: Pumice brings no such recipe; {hint}"
        with pytest.raises(InputError, match=message):
            load_recipe(extend(tmp_path, "mine.yaml", extends=f"pumice:{name}"))
    with pytest.raises(InputError, match=r"there is no .*; one that Pumice brings is named pumice:finetune"):
        load_recipe(extend(tmp_path, "mine.yaml", extends="../recipes/finetune.yaml"))


def test_a_copy_of_the_example_works_from_any_folder(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "finetune.yaml"
    (tmp_path / "copy.yaml").write_bytes(example.read_bytes())
    assert load_recipe(tmp_path / "copy.yaml") == load_recipe(example)


def test_a_wheel_brings_the_recipes(tmp_path: Path) -> None:
    """An installed package has no clone around it: its recipes are inside, where pyproject.toml puts them."""
    root = Path(__file__).parents[2]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    (source, target), *more = re.findall(
        r'^"(.+)" = "(pumice/.+)"',
        text.split("[tool.hatch.build.targets.wheel.force-include]")[1],
        re.MULTILINE,
    )
    assert (source, more) == ("recipes", [])
    shutil.copytree(
        root / "src" / "pumice", tmp_path / "pumice", ignore=shutil.ignore_patterns("models", "*.pyc")
    )
    shutil.copytree(root / source, tmp_path / target)
    code = "import pumice.train.recipe as r; print(r.load_recipe('pumice:finetune').name, r.__file__)"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"fine-tuning {tmp_path}")


def test_a_field_that_came_later_is_stored_only_where_it_is_set(tmp_path: Path) -> None:
    """So that the folder of a run looks to an earlier version as its own."""
    plain = load_recipe(write(tmp_path))
    assert set(plain.stored()["data"][0]) == {"rows", "weight", "mirror"}
    assert "shuffle_block" not in plain.stored() and plain.stored()["seed"] == 0
    overrides = ["shuffle_block=5", "data.0.split=train", "data.0.columns={image: photo}"]
    changed = load_recipe(write(tmp_path), overrides)
    assert changed.stored()["shuffle_block"] == 5
    assert changed.stored()["data"][0] == plain.stored()["data"][0] | {
        "split": "train",
        "columns": {"image": "photo"},
    }
    for recipe in (plain, changed):
        assert Recipe.model_validate(recipe.stored()) == recipe


def test_a_stage_of_pumice_is_found_with_the_stage_before_it() -> None:
    """From anywhere: the model that the first stage writes does not exist."""
    name = "pumice:llava-1.5/2-lora-7b"
    config, notes = shape(load_recipe(name), recipe_path(name))
    assert config.decoder.depth == 32
    assert any("does not exist yet: its shape follows from 1-align-7b.yaml" in note for note in notes)
