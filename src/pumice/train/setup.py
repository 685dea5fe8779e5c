"""A stage's model: opened or put together, the named parts set to learn, and saved again.

Knows recipes, weights and modules. Does not know data.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pumice.config import LoraConfig
from pumice.errors import InputError, WorkError
from pumice.model.adapters import add_lora
from pumice.model.llava import Llava
from pumice.model.quantized_base import QuantizedLinear, quantize_base
from pumice.processor import Processor
from pumice.train.recipe import NewModel, Recipe
from pumice.weights import folder
from pumice.weights.checkpoint import Stored
from pumice.weights.load import Opened, find_device, new_model, open_model


@dataclass
class Setup:
    model: Llava
    processor: Processor  # with the stage's template
    opened: Opened  # with the model's own
    recipe: Recipe
    device: torch.device

    @staticmethod
    def part_of(name: str) -> str:
        """The part of the model that a parameter belongs to."""
        if name == "image_newline":
            return "connector"  # like it, fresh when a model is put together
        return "lora" if name.endswith((".lora_a", ".lora_b")) else name.partition(".")[0]

    def describe(self, steps: int) -> list[str]:
        """The stage in words: which parts learn, at which rate, and how much."""
        sizes: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            part = self.part_of(name)
            sizes[part] = sizes.get(part, 0) + parameter.numel()
        for module in self.model.decoder.modules():
            if isinstance(module, QuantizedLinear):
                sizes["decoder"] += module.in_features * module.out_features
        learn = {str(part): rate for part, rate in self.recipe.stage.learn.items()}
        lines = [f"{self.recipe.name}: {steps} steps of {self.recipe.batch} pictures on {self.device}"]
        for part, size in sizes.items():
            does = f"learns at {learn[part]:g}" if part in learn else "frozen"
            lines.append(f"  {part:<10} {size / 1e6:8.2f} M parameters  {does}")
        return lines

    def save(self, path: Path, summary: dict[str, Any]) -> Path:
        """Write the model's folder: what was trained, and where the rest comes from."""
        learn = set(self.recipe.stage.learn)
        parts = {part: source for part, source in self.opened.parts.items() if part not in learn}
        history = [*self.opened.provenance.get("stages", []), summary]
        folder.save(
            path,
            self.model.config,
            {**self.model.state_dict(), **self._untouched()},
            tokenizer=self.processor.tokenizer.backend.to_str(),
            provenance={**self.opened.provenance, "stages": history},
            parts=parts,
        )
        return path

    def _untouched(self) -> dict[str, Stored]:
        """Frozen tensors as they are kept where they came from, before rounding to bf16."""
        learn = self.recipe.stage.learn
        return {name: kept for name, kept in self.opened.stored.items() if self.part_of(name) not in learn}

    def save_and_compare(self) -> None:
        """Save the model and read it back before the first step, so that saving cannot fail at the end.

        Raises WorkError naming the tensor that came back different.
        """
        self.recipe.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.recipe.output) as scratch:
            path = self.save(Path(scratch) / "model", {})
            read = open_model(
                path, device=self.device, dtype=self.model.dtype, merge=False
            ).model.state_dict()
        for name, tensor in self.model.state_dict().items():
            if not torch.equal(read[name].to(tensor.dtype), tensor):
                raise WorkError(f"saving the model changes {name}; nothing was trained")


def prepare(recipe: Recipe) -> Setup:
    """The model of a recipe on its device, the stage's parts in fp32 and learning, the rest frozen."""
    device = find_device(recipe.device)
    quantised = recipe.stage.base != "none"
    place = torch.device("cpu") if quantised else device  # whole weights need not fit the GPU then
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if isinstance(recipe.model, NewModel):
        new = recipe.model
        opened = new_model(
            new.tower, new.decoder, vision=new.vision, connector=new.connector, image=new.image,
            template=new.template, device=place, dtype=dtype,
        )  # fmt: skip
    else:
        opened = open_model(recipe.model, device=place, dtype=dtype, merge=False)
    model = opened.model
    if recipe.stage.lora is not None:
        if model.config.lora is not None:
            raise InputError("the model has LoRA adapters already; leave stage.lora out to go on with them")
        lora = LoraConfig(**recipe.stage.lora.model_dump())
        add_lora(model.decoder, lora)
        model.config = dataclasses.replace(model.config, lora=lora)
    if quantised:
        quantize_base(model.decoder, recipe.stage.base)
        model.to(device)
        if device.type != "cpu":
            model.tower.to(dtype)
            model.connector.to(dtype)
    learn = recipe.stage.learn
    if "lora" in learn and model.config.lora is None:
        raise InputError("stage.learn names lora, but the model has no adapters; describe them in stage.lora")
    for name, parameter in model.named_parameters():
        learns = Setup.part_of(name) in learn
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.float()  # small updates need more than bf16's eight bits
    processor = Processor(
        recipe.stage_config(model.config), opened.processor.tokenizer, truncate=recipe.truncate
    )
    return Setup(model, processor, opened, recipe, device)
