"""What a LoRA stage trained is exported: the adapters are merged, whatever their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pumice.formats.export import export
from pumice.formats.load import open_model
from pumice.formats.pumice.folder import open_parts, save
from pumice.model.adapters import LoraLinear
from pumice.train import run
from pumice.train.recipe import Stage, load_recipe
from pumice.train.setup import prepare

ROOT = Path(__file__).parents[2]
STAGES = {
    str(path.relative_to(ROOT)): recipe.stage
    for path in sorted([*(ROOT / "recipes").rglob("*.y*ml"), *(ROOT / "examples").rglob("*.y*ml")])
    if (recipe := load_recipe(path)).stage.lora is not None
}


def stage_of(stage: Stage) -> dict[str, Any]:
    """Its adapters on a base of the same kind; int8 stands for nf4, which wants a GPU's library."""
    assert stage.lora is not None
    lora = stage.lora.model_dump(mode="json")
    base = "none" if stage.base == "none" else "int8"
    return {"learn": {"connector": 3e-3, "lora": 3e-3}, "lora": lora, "base": base}


@pytest.fixture(scope="module")
def full_model(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA 1.5, which every format can hold."""
    model = models.tiny(models.ARCHITECTURES["CLIP + Llama, pad (LLaVA 1.5)"])
    path = tmp_path_factory.mktemp("whole") / "model"
    save(path, model.config, model.state, tokenizer=model.tokenizer.to_str())
    return path


def test_recipes_with_dropout_are_among_them() -> None:
    assert any(stage.lora is not None and stage.lora.dropout > 0 for stage in STAGES.values())


@pytest.mark.parametrize("recipe", STAGES)
def test_the_export_computes_what_was_trained(
    make_recipe: Callable[..., Path], full_model: Path, tmp_path: Path, recipe: str
) -> None:
    trained = run(
        make_recipe(model=str(full_model), stage=stage_of(STAGES[recipe]), epochs=2, pack_tokens=256)
    )
    ids = torch.randint(100, (1, 40), generator=torch.Generator().manual_seed(0))

    def logits(path: Path, **options: Any) -> torch.Tensor:
        model = open_model(path, **options).model
        with torch.inference_mode():
            return model.decoder.logits(model(ids))

    expected = logits(trained, merge=False)
    before = logits(full_model)
    assert (expected - before).abs().max() > 0.01, "nothing was learned, so this test could not fail"
    for to, kind in (("hf", None), ("llava", None), ("gguf", "f32")):
        export(open_parts(trained), to, tmp_path / to, kind=kind)
        file = tmp_path / to / "model-f32.gguf" if to == "gguf" else tmp_path / to
        actual = logits(file, template="v1")[..., : expected.shape[-1]]
        # measured worst case of all recipes and formats: 3.9e-6
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        print(f"{recipe} {to}: {difference:.1e}")
        assert difference < 1e-4, to


def test_fresh_adapters_are_in_the_mode_of_their_model(
    make_recipe: Callable[..., Path], full_model: Path
) -> None:
    for base in ("none", "int8"):
        stage = {"learn": {"lora": 1e-3}, "lora": {"rank": 2, "dropout": 0.5}, "base": base}
        model = prepare(load_recipe(make_recipe(model=str(full_model), stage=stage))).model
        assert not any(module.training for module in model.modules())
        assert base == "int8" or any(isinstance(module, LoraLinear) for module in model.modules())
