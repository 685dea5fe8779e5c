"""A folder with tiny models and rows, in which recipes run; for the pretend device and benchmarks/gpu.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from pumice.config import VisionConfig
from pumice.formats.pumice import folder as folders
from pumice.model.llava import Llava
from pumice.train import loop
from pumice.train.recipe import load_recipe
from pumice.train.report import read_metrics
from pumice.train.setup import prepare

_spec = importlib.util.spec_from_file_location("small", Path(__file__).parents[1] / "train" / "conftest.py")
assert _spec is not None and _spec.loader is not None
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)
CLIP = VisionConfig(
    kind="clip", image_size=56, width=32, stride=14, depth=3, heads=2, mlp_width=64, activation="quick_gelu"
)
LORA = {"learn": {"connector": 3e-3, "lora": 3e-3}, "lora": {"rank": 4, "alpha": 8}}
DROPOUT = LORA | {"lora": {"rank": 4, "alpha": 8, "dropout": 0.3}}
STAGES: dict[str, dict[str, Any]] = {
    "full": {"learn": {"connector": 3e-3, "decoder": 3e-3}},
    "connector": {"learn": {"connector": 3e-3}, "template": "plain"},
    "embeddings": {"learn": {"connector": 3e-3, "embeddings": 3e-3}},
    "tower": {"learn": {"tower": 1e-3, "connector": 3e-3, "decoder": 3e-3}},
    "lora": LORA,
    "int8": LORA | {"base": "int8"},
}


class Workshop:
    """A folder with tiny models and rows, in which recipes run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = folder / "rows"
        self.rows.mkdir(parents=True)
        small.write_rows(self.rows)
        lines = (self.rows / "rows.jsonl").read_text().splitlines()
        turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
        lines.append(json.dumps({"id": "text", "conversations": turns}))
        (self.rows / "rows.jsonl").write_text("\n".join(lines) + "\n")

    def model(self, **decoder: Any) -> Path:
        """Write a model with a CLIP tower, with some fields of its decoder changed, and return its folder."""
        path = self.folder / f"model-{'-'.join(f'{name}={value}' for name, value in decoder.items())}"
        if not path.exists():
            tokenizer, config = small.tiny_config()
            changed = dataclasses.replace(config.decoder, head_dim=16, **decoder)
            config = dataclasses.replace(config, vision=CLIP, decoder=changed)
            torch.manual_seed(1)
            model = Llava(config)
            with torch.no_grad():
                model.decoder.embed.weight.mul_(0.1)
            folders.save(path, config, model.state_dict(), tokenizer=tokenizer.to_str())
        return path

    def recipe(self, name: str, device: str, **changes: Any) -> Any:
        values = {
            "name": name, "output": str(self.folder / f"{name}-{device}"), "model": str(self.model()),
            "stage": STAGES["full"], "data": [{"rows": str(self.rows / "rows.jsonl")}],
            "pictures": [str(self.rows)], "batch": 2, "pack_tokens": 96, "precision": "fp32",
            "device": device, "max_steps": 2, "measure_every": 1000,
        }  # fmt: skip
        path = self.folder / f"{name}-{device}.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return load_recipe(path)

    def train(self, name: str, device: str, **changes: Any) -> list[dict[str, Any]]:
        """Run a recipe and return its metrics."""
        recipe = self.recipe(name, device, **changes)
        loop.train(recipe)
        return read_metrics(recipe.output / "metrics.jsonl")

    def stage(self, name: str, device: str, **changes: Any) -> list[dict[str, Any]]:
        """Train a stage with held-out rows and a sample answer, and return its metrics."""
        changes |= {"held_out": [{"rows": str(self.rows / "rows.jsonl")}], "sample_answers": 1}
        return self.train(name, device, stage=STAGES[name], **changes)

    def resumes(self, device: str, trainer: type[loop.Trainer] | None = None, **changes: Any) -> bool:
        """Return whether a run with dropout and the same resumed from its middle have equal weights.

        trainer: of both runs.
        """
        changes |= {"stage": DROPOUT, "max_steps": 4, "epochs": 2, "save_every": 2, "keep_last": 9}
        recipe = self.recipe("resume", device, **changes)
        last = recipe.output / "checkpoints" / "step-000004"
        weights = []
        for _ in ("whole", "resumed"):
            loop.train(recipe, trainer)
            weights.append(load_file(last / "tensors" / "all.safetensors"))
            shutil.rmtree(last)
            shutil.rmtree(recipe.output / "model")
        whole, resumed = weights
        return all(torch.equal(whole[name], resumed[name]) for name in whole)

    def trainer(self, name: str, device: str, **changes: Any) -> loop.Trainer:
        recipe = self.recipe(name, device, **changes)
        return loop.Trainer(recipe, prepare(recipe))
