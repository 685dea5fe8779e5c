"""Every shipped recipe is read, its model's shape built and its stage tried; documented ones are read."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pumice.data.rows import Rows
from pumice.formats.read import find_model
from pumice.model.llava import Llava
from pumice.templates import get_template
from pumice.train.recipe import NewModel, Recipe, load_recipe
from pumice.train.setup import part_of
from pumice.train.shapes import shape

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "recipes").rglob("*.y*ml"), *(ROOT / "examples").rglob("*.y*ml")])
# They begin from what scripts of projects/pumice-tiny write.
WIDENED = {
    ROOT / "recipes" / "pumice-tiny" / f"{name}.yaml"
    for name in ("4-coco", "5-answers", "6-see", "7-see-both", "8-more")
}
NAMES = {str(path.relative_to(ROOT)) for path in SHIPPED}
DOCUMENTED = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "recipes" / "README.md", ROOT / "README.md"])
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S))
    # `pumice data mix` has sources, `pumice data generate` an endpoint: these are no recipes of training.
    if not re.search(r"^(sources|endpoint):", block, re.M)
]
WHOLE: dict[str, Any] = {
    "name": "a", "output": "o", "model": "m", "data": [{"rows": "r"}],
    "stage": {"learn": {"connector": 1e-3}},
}  # fmt: skip


def test_all_published_recipes_are_there() -> None:
    sizes = [f"{stage}-{size}" for stage in ("1-align", "2-instruct") for size in ("7b", "13b")]
    expected_recipes = {
        f"recipes/llava-{version}/{stage}.yaml" for version in ("1.0", "1.5") for stage in sizes
    }
    expected_recipes |= {
        f"recipes/llava-1.5/2-{kind}-{size}.yaml" for kind in ("lora", "qlora") for size in ("7b", "13b")
    }
    expected_recipes |= {"recipes/llava-next/1-align-7b.yaml", "recipes/llava-next/2-instruct-7b.yaml"}
    expected_recipes |= {"recipes/scienceqa/1-align-13b.yaml", "recipes/scienceqa/2-answer-13b.yaml"}
    expected_recipes |= {
        "recipes/small/1-align.yaml",
        "recipes/small/2-instruct.yaml",
        "recipes/small/siglip2-qwen3-1-align.yaml",
        "recipes/small/siglip2-qwen3-2-instruct.yaml",
        "recipes/small/smolvlm.yaml",
        "recipes/finetune.yaml",
        "recipes/boxes.yaml",
    }
    expected_recipes |= {
        f"recipes/pumice-tiny/{name}.yaml"
        for name in (
            "0-warm",
            "1-align",
            "2-instruct",
            "3-agree",
            "4-coco",
            "5-answers",
            "6-see",
            "7-see-both",
            "8-more",
        )
    }
    assert expected_recipes | {"examples/finetune.yaml"} <= NAMES


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path not in WIDENED], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_recipe_s_model_has_what_its_stage_names(path: Path) -> None:
    recipe = load_recipe(path)
    config, _ = shape(recipe, path)
    staged = recipe.stage_config(config)
    if staged.template != "own":
        get_template(staged.template, staged.chat)
    assert staged.image_tokens < staged.decoder.context and staged.image_tokens < recipe.pack_tokens
    with torch.device("meta"):
        model = Llava(config)
    parts = {part_of(name, recipe.stage.learn) for name, _ in model.named_parameters()}
    assert set(recipe.stage.learn) <= parts
    if isinstance(recipe.model, NewModel):
        return
    if path.parent.name == "examples":
        find_model(recipe.model)
        assert {row.image[0] for row in Rows(ROOT / recipe.data[0].rows)} < set(os.listdir(path.parent))
    elif path.name not in (
        "finetune.yaml",
        "boxes.yaml",
        "smolvlm.yaml",
    ):  # a stage that goes on from another names the model that it writes
        assert recipe.model in {load_recipe(other).output / "model" for other in path.parent.glob("*.yaml")}


@pytest.mark.parametrize("path", sorted(WIDENED), ids=lambda path: path.stem)
def test_a_later_stage_of_pumice_tiny_learns_parts_of_stage_3(path: Path) -> None:
    before = load_recipe(path.with_name("3-agree.yaml"))
    after = load_recipe(path)
    assert after.stage.learn.keys() == before.stage.learn.keys()
    assert {row.rows for row in after.held_out} > {row.rows for row in before.held_out}


# batch, epochs, learning rates, image mode of the stage, image tokens: /LLaVA's own scripts, see each recipe
PUBLISHED: dict[str, tuple[int, float, dict[str, float], str, int]] = {
    "llava-1.0/1-align": (128, 1, {"connector": 2e-3}, "crop", 256),
    "llava-1.0/2-instruct": (32, 3, {"connector": 2e-5, "decoder": 2e-5}, "crop", 256),
    "llava-1.5/1-align": (256, 1, {"connector": 1e-3}, "crop", 576),
    "llava-1.5/2-instruct": (128, 1, {"connector": 2e-5, "decoder": 2e-5}, "pad", 576),
    "llava-1.5/2-lora": (128, 1, {"connector": 2e-5, "lora": 2e-4}, "pad", 576),
}


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str, size: str) -> None:
    path = ROOT / "recipes" / f"{name}-{size}.yaml"
    recipe = load_recipe(path)
    config, _ = shape(recipe, path)
    staged = recipe.stage_config(config)
    batch, epochs, learn, mode, tokens = PUBLISHED[name]
    assert (recipe.batch, recipe.epochs, dict(recipe.stage.learn)) == (batch, epochs, learn)
    assert (staged.image.mode, staged.image_tokens, staged.decoder.context) == (mode, tokens, 2048)
    assert (recipe.warmup, recipe.weight_decay, recipe.precision) == (0.03, 0.0, "bf16")
    assert staged.template == ("plain" if "align" in name else "v1")
    assert config.template == "v1"
    assert config.decoder.width == {"7b": 4096, "13b": 5120}[size]
    if name == "llava-1.5/2-instruct":
        assert staged.image.pad_color == (122, 116, 104)
    if recipe.stage.lora is not None:
        assert (recipe.stage.lora.rank, recipe.stage.lora.alpha, recipe.stage.lora.dropout) == (
            128,
            256,
            0.05,
        )


def test_a_stage_trains_on_a_tiny_model_of_its_kind() -> None:
    """The stage of LLaVA-NeXT, whose parts learn at rates of their own, on a model small enough to run."""
    path = ROOT / "recipes" / "llava-next" / "2-instruct-7b.yaml"
    recipe = load_recipe(path)
    config, _ = shape(recipe, path)
    small = dataclasses.replace(config.decoder, vocab_size=64, width=32, depth=1, heads=2, kv_heads=2,
                                head_dim=16, mlp_width=32)  # fmt: skip
    vision = dataclasses.replace(config.vision, width=16, depth=2, heads=2, mlp_width=16)
    model = Llava(dataclasses.replace(config, decoder=small, vision=vision))
    rates = {
        name: recipe.stage.learn.get(part_of(name, recipe.stage.learn))
        for name, _ in model.named_parameters()
    }
    assert rates["image_newline"] == 1e-5 and rates["tower.patch.weight"] == 2e-6
    assert rates["decoder.embed.weight"] == rates["connector.layers.0.weight"] == 1e-5


@pytest.mark.parametrize("block", DOCUMENTED)
def test_yaml_in_the_documentation_is_a_recipe(block: str) -> None:
    values = yaml.safe_load(block)
    if "extends" in values:
        name = values.pop("extends")
        assert name.startswith("pumice:")
        assert (ROOT / "recipes" / f"{name.removeprefix('pumice:')}.yaml").is_file()
    Recipe.model_validate(WHOLE | values)
