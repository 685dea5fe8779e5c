"""A stage's model: opened or put together, the named parts set to learn, and saved again.

Knows recipes, weights and modules. Does not know data.

What is in memory when, for one process (bytes; W weights, L those that learn, T tokens of a pack, t the
largest pack's tokens, S supervised predictions of a chunk, D width, M MLP width, V vocabulary):

    always          4 W in fp32 (bf16: 2 for frozen ones), under FSDP divided by the processes, but for a
                    frozen tower, which stays whole
    first step on   4 L gradients (from a step's first backward pass to its end) and 8 L AdamW moments (2 L
                    with adamw8bit); both under FSDP divided by the processes
    a pack          what its blocks keep for the backward pass, from its forward to its backward pass, then
                    freed: packs of a step run one after the other. Per token and block, in values of the
                    activations' type: none about 16 D + 5 M where the block learns (12 D + 4 M frozen),
                    selective about 9 D + 2 M, full D. Nothing where no gradient passes (nothing learns
                    before the loss but embeddings that are frozen: no graph at all)
    a pack's loss   256 V fp32 twice (one chunk's logits and gradient), and V D fp32 once more where the
                    vocabulary projection learns
    pictures        frozen tower: one call of 8 squares, no graph; then F C fp32 a square until the backward
                    pass. A tower that learns keeps its blocks' activations of all the pack's squares at once
    workers         for each, one step's pixels: 12 S S bytes a square (features instead, once cached)
    the trial save  nothing beyond one tensor; under FSDP the first process holds the whole model once more
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.config import LoraConfig
from pumice.errors import InputError, WorkError
from pumice.formats.load import Opened, find_device, new_model, open_model
from pumice.formats.pumice import folder
from pumice.formats.read import read_model
from pumice.model.adapters import add_lora
from pumice.model.llava import Llava
from pumice.model.quantized_base import QuantizedLinear, quantize_base
from pumice.model.vision import ViT
from pumice.processor import Processor
from pumice.storage.tensors import LazyTensor, close_last_file
from pumice.train.recipe import NewModel, Recipe


@dataclass
class Setup:
    model: Llava
    processor: Processor  # with the stage's template
    opened: Opened  # with the model's own
    recipe: Recipe
    device: torch.device

    def part_of(self, name: str) -> str:
        """The part of the model that a parameter belongs to, by the parts that the stage tells apart."""
        return part_of(name, self.recipe.stage.learn)

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

    def record_max_images(self, images: int) -> None:
        """Record in the model's config that rows of this stage show up to `images` images.

        The number stays unknown for a model that somebody else trained, unless these rows show several.
        """
        config = self.model.config
        before = config.trained_pictures
        if before is None and (images <= 1 or config.image.several == "square"):
            return
        self.model.config = dataclasses.replace(config, trained_pictures=max(before or 0, images))

    def save(self, path: Path, summary: dict[str, Any], state: dict[str, Tensor] | None = None) -> Path:
        """Write the model's folder: what was trained, and where the rest comes from.

        state: the model's whole tensors, where its own are only parts of them.
        """
        learn = {WITHIN.get(part, str(part)) for part in self.recipe.stage.learn}
        parts = {part: source for part, source in self.opened.parts.items() if part not in learn}
        history = [*self.opened.provenance.get("stages", []), summary]
        state = state or self.model.state_dict()
        folder.save(
            path,
            self.model.config,
            {**state, **self._untouched(state)},
            tokenizer=self.processor.tokenizer.backend.to_str(),
            provenance={**self.opened.provenance, "stages": history},
            parts=parts,
            sentencepiece=self.opened.sentencepiece,
        )
        return path

    def _untouched(self, state: dict[str, Tensor]) -> dict[str, LazyTensor]:
        """Frozen tensors as they are kept where they came from, before rounding to bf16 or to fewer bits.

        Weights that `state` holds just so are left out: reading them would map their pages once more.
        """
        learn = self.recipe.stage.learn
        held = {name: state[name].dtype for name, _ in self.model.named_parameters() if name in state}
        return {
            name: kept
            for name, kept in self.opened.stored.items()
            if self.part_of(name) not in learn and held.get(name) != kept.dtype
        }

    def save_and_compare(self, state: dict[str, Tensor] | None = None) -> None:
        """Save the model and read it back before the first step, so that saving cannot fail at the end.

        state: as in `save`. Raises WorkError naming the tensor that came back different.
        """
        self.recipe.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.recipe.output) as scratch:
            path = self.save(Path(scratch) / "model", {}, state)
            # one tensor at a time: a second model need not fit into memory
            read = read_model(path).state
            for name, tensor in (state or self.model.state_dict()).items():
                if name.endswith(".num_batches_tracked"):
                    continue  # no model needs it, none keeps it
                if name not in read or not torch.equal(read[name].read(tensor.dtype).to(tensor), tensor):
                    raise WorkError(f"saving the model changes {name}; nothing was trained")
        close_last_file()  # its pages would count as memory during the first steps


# parts that stand inside another one: it learns them too unless a recipe names them apart
WITHIN = {"image_newline": "connector", "embeddings": "decoder"}


def part_of(name: str, learn: Container[str]) -> str:
    """The part of the model that a parameter belongs to; `learn` holds the parts that are told apart.

    `embeddings` are the decoder's, with its vocabulary projection.
    """
    inner = "image_newline" if name == "image_newline" else None
    if name.startswith(("decoder.embed.", "decoder.head.")):
        inner = "embeddings"
    if inner is not None:
        return inner if inner in learn else WITHIN[inner]
    return "lora" if name.endswith((".lora_a", ".lora_b")) else name.partition(".")[0]


def learned(model: Llava, learn: Container[str]) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: those of the named parts, but for what is never run.

    What stands behind the tower's chosen hidden state is kept, but no gradient ever reaches it.
    """
    idle: set[int] = set()
    if isinstance(tower := model.tower, ViT):
        unused = [*tower.blocks[tower.running :], tower.post_norm]
        idle = {id(parameter) for module in unused for parameter in module.parameters()}
    named = model.named_parameters()
    return {name: p for name, p in named if part_of(name, learn) in learn and id(p) not in idle}


def prepare(recipe: Recipe, place: str | None = None) -> Setup:
    """The model of a recipe on its device, the stage's parts in fp32 and learning, the rest frozen.

    place: the device, where it is not the recipe's own: one of several, or the CPU before shards are cut.
    """
    device = find_device(place or recipe.device)
    quantised = recipe.stage.base != "none"
    first = torch.device("cpu") if quantised else device  # whole weights need not fit the GPU then
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if isinstance(recipe.model, NewModel):
        new = recipe.model
        opened = new_model(
            new.tower, new.decoder, vision=new.vision, connector=new.connector, image=new.image,
            template=new.template, device=first, dtype=dtype,
        )  # fmt: skip
    else:
        opened = open_model(recipe.model, device=first, dtype=dtype, merge=False)
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
    model.requires_grad_(False)
    for parameter in learned(model, learn).values():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()  # small updates need more than bf16's eight bits
    processor = Processor(
        recipe.stage_config(model.config), opened.processor.tokenizer, truncate=recipe.truncate
    )
    return Setup(model, processor, opened, recipe, device)
