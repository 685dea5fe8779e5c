"""Prepare a stage's model: open or build it, set the named parts to learn, and save it again.

The memory of one process, in bytes (W weights, L weights that learn, D width, M MLP width, V vocabulary,
F features of a tile, C tower width, S side of a tile in pixels):

    always          4 W in fp32; with bf16, 2 for each frozen weight. FSDP divides this by the processes, but
                    a frozen tower stays whole
    from step 1     4 L for gradients, from a step's first backward pass to its end, and 8 L for AdamW's
                    moments (2 L with adamw8bit). FSDP divides both by the processes
    a pack          the activations that its blocks keep for the backward pass. Packs of a step run one after
                    the other, so only one pack's are in memory. Values per token and block, by the
                    recipe's `checkpointing`: none about 16 D + 5 M where the block learns (12 D + 4 M where
                    it is frozen), selective about 9 D + 2 M, full D. Nothing where a block passes no gradient
    a pack's loss   256 V in fp32 twice (one chunk's logits and their gradient), and V D in fp32 once more
                    where the vocabulary projection learns
    images          frozen tower: one call of 8 tiles without a graph, then F C in fp32 per tile until the
                    backward pass. A tower that learns keeps the activations of all the pack's tiles at once
    workers         for each, the pixels of one step: 12 S S per tile (features instead, once cached)
    the trial save  one tensor; under FSDP the first process gathers the whole model in host memory
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.config import LoraConfig
from pumice.errors import InputError, WorkError, counted
from pumice.formats.load import build, find_device
from pumice.formats.pumice import folder
from pumice.formats.read import read_model
from pumice.model.adapters import add_lora
from pumice.model.llava import Llava
from pumice.model.quantized_base import QuantizedLinear, quantize_base
from pumice.model.vision import ViT
from pumice.processor import Processor
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyTensor, close_last_file
from pumice.train.devices import thread_notes
from pumice.train.recipe import BLOCKS, Recipe
from pumice.train.shapes import draw_parts


@dataclass
class Setup:
    """A stage's model on its device, and what prepares its samples."""

    model: Llava
    processor: Processor  # with the stage's template and image policy
    loaded: LoadedParts  # the model as it was read, with its own template
    recipe: Recipe
    device: torch.device

    def part_of(self, name: str) -> str:
        """Return the part of the model that a parameter belongs to, as the stage names its parts."""
        return part_of(name, self.recipe.stage.learn)

    def describe(self, steps: int, pictures: int) -> list[str]:
        """Return lines that say which parts learn, at which rate, and how many parameters they have.

        pictures: of a step.
        """
        sizes: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            part = self.part_of(name)
            sizes[part] = sizes.get(part, 0) + parameter.numel()
        # Quantised weights are buffers, so `named_parameters` does not count them.
        for module in self.model.decoder.modules():
            if isinstance(module, QuantizedLinear):
                sizes["decoder"] += module.in_features * module.out_features
        learn = self.recipe.stage.learn
        lines = [
            f"{self.recipe.name}: {counted(steps, 'step')} of {counted(pictures, 'picture')} on {self.device}"
        ]
        for part, size in sizes.items():
            status = f"learns at {learn[part]:g}" if part in learn else "frozen"
            lines.append(f"  {part:<10} {size / 1e6:8.2f} M parameters  {status}")
        return lines + [f"  {note}" for note in thread_notes(self.device.type)]

    def record_max_images(self, images: int) -> None:
        """Record in the model's config that rows of this stage show up to `images` images.

        The number stays unknown for a model that somebody else trained, unless these rows show several.
        """
        config = self.model.config
        known_max = config.trained_pictures
        if known_max is None and (images <= 1 or config.image.several == "square"):
            return
        self.model.config = dataclasses.replace(config, trained_pictures=max(known_max or 0, images))

    def save(self, path: Path, summary: dict[str, Any], state: dict[str, Tensor] | None = None) -> Path:
        """Write the model's folder and return its path.

        summary: of this stage, for the model's provenance. state: the gathered tensors under FSDP, where each
        process has only shards of them.
        """
        # A part that learned no longer equals its source, so the folder must not name that source for it.
        learn = {PARENT_PART.get(part, part.partition(".")[0]) for part in self.recipe.stage.learn}
        parts = {part: source for part, source in self.loaded.parts.items() if part not in learn}
        history = [*self.loaded.provenance.get("stages", []), summary]
        state = state or self.model.state_dict()
        folder.save(
            path,
            self.model.config,
            {**state, **self._untouched(state)},
            tokenizer=self.processor.tokenizer.backend.to_str(),
            provenance={**self.loaded.provenance, "stages": history},
            parts=parts,
            sentencepiece=self.loaded.sentencepiece,
        )
        return path

    def _untouched(self, state: dict[str, Tensor]) -> dict[str, LazyTensor]:
        """Return the frozen tensors as their files store them, not rounded to bf16 or to fewer bits.

        Tensors that `state` holds in the same type are left out: reading them again costs memory.
        """
        learn = self.recipe.stage.learn
        state_dtypes = {name: state[name].dtype for name, _ in self.model.named_parameters() if name in state}
        return {
            name: stored
            for name, stored in self.loaded.state.items()
            if self.part_of(name) not in learn and state_dtypes.get(name) != stored.dtype
        }

    def save_and_compare(self, state: dict[str, Tensor] | None = None) -> None:
        """Save the model and read it back before the first step, so that saving cannot fail at the end.

        state: as in `save`. Raises WorkError naming the tensor that came back different.
        """
        self.recipe.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.recipe.output) as scratch:
            path = self.save(Path(scratch) / "model", {}, state)
            # Compare one tensor at a time: a second model may not fit into memory.
            saved = read_model(path).state
            for name, tensor in (state or self.model.state_dict()).items():
                if name.endswith(".num_batches_tracked"):
                    continue  # training alone uses this counter; files do not store it
                if name not in saved or not torch.equal(saved[name].read(tensor.dtype).to(tensor), tensor):
                    raise WorkError(f"saving the model changes {name}; nothing was trained")
        # The pages of an open file would count as memory of the run during the first steps.
        close_last_file()


_BLOCK = re.compile(r"(decoder|tower)\.blocks\.(\d+)\.")
# Parts inside another part. They learn with it, unless the recipe names them with a rate of their own.
PARENT_PART = {"image_newline": "connector", "embeddings": "decoder"}


def part_of(name: str, learn: Iterable[str]) -> str:
    """Return the part of the model that a parameter belongs to; `learn` holds the parts that the stage names.

    `embeddings` are the decoder's token embeddings and its vocabulary projection. A parameter of a block
    belongs to the blocks that the stage names (decoder.28-31), if they include it.
    """
    learn = set(learn)
    inner = "image_newline" if name == "image_newline" else None
    if name.startswith(("decoder.embed.", "decoder.head.")):
        inner = "embeddings"
    if inner is not None:
        return inner if inner in learn else PARENT_PART[inner]
    if name.endswith((".lora_a", ".lora_b")):
        return "lora"
    if block := _BLOCK.match(name):
        for named in filter(None, map(BLOCKS.fullmatch, learn)):
            if named[1] == block[1] and int(named[2]) <= int(block[2]) <= int(named[3]):
                return named[0]
    return name.partition(".")[0]


def trainable_parameters(model: Llava, learn: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name: all of the named parts that the forward pass uses."""
    # The tower's blocks after the chosen hidden state never run. They stay in the model, but
    # no gradient ever reaches them.
    idle: set[int] = set()
    if isinstance(tower := model.tower, ViT):
        unused = [*tower.blocks[tower.running :], tower.post_norm]
        idle = {id(parameter) for module in unused for parameter in module.parameters()}
    named = model.named_parameters()
    return {name: p for name, p in named if part_of(name, learn) in learn and id(p) not in idle}


def prepare(recipe: Recipe, device_name: str | None = None, load_on: str | None = None) -> Setup:
    """Return a recipe's model on its device: the stage's parts learn in fp32, all others are frozen.

    device_name: replaces the recipe's device, as one of several GPUs. load_on: where the model is built and
    stays, in the types of the device: "cpu" before FSDP makes shards, or "meta", without values.
    Raises InputError where the stage's adapters do not fit the model's.
    """
    # 1. Open or build the model. A QLoRA base starts on the CPU: unquantised it need not fit the GPU.
    device = find_device(device_name or recipe.device)
    quantised = recipe.stage.base != "none"
    load_device = torch.device(load_on or ("cpu" if quantised else device))
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    opened = build(*draw_parts(recipe), load_device, dtype, merge=False)
    model = opened.model
    # 2. Add adapters before quantising, because they wrap the layers that are quantised next.
    if recipe.stage.lora is not None:
        if model.config.lora is not None:
            raise InputError("the model has LoRA adapters already; leave stage.lora out to train them")
        lora = LoraConfig(**recipe.stage.lora.model_dump())
        add_lora(model.decoder, lora)
        model.config = dataclasses.replace(model.config, lora=lora)
    # 3. Quantise the LLM on the device, layer by layer. A GPU runs the other parts in `dtype` too.
    if quantised:
        quantize_base(model.decoder, recipe.stage.base, device if load_on is None else load_device)
    if load_on is None:
        model.to(device)
    if load_device != device and device.type != "cpu":
        model.tower.to(dtype)
        model.connector.to(dtype)
    # 4. Freeze everything, then let the named parts learn.
    learn = recipe.stage.learn
    if "lora" in learn and model.config.lora is None:
        raise InputError("stage.learn names lora, but the model has no adapters; describe them in stage.lora")
    model.requires_grad_(False)
    for parameter in trainable_parameters(model, learn).values():
        parameter.requires_grad_(True)
        # bf16 has eight bits of precision: small updates would round to nothing.
        parameter.data = parameter.data.float()
    # 5. Prepare samples with the stage's config. The model keeps its own, which is what `save` writes: only
    # how it writes boxes is what it learns now.
    staged = recipe.stage_config(model.config)
    model.config = dataclasses.replace(model.config, boxes=staged.boxes)
    processor = Processor(staged, opened.processor.tokenizer, truncate=recipe.truncate)
    return Setup(model, processor, opened.loaded, recipe, device)
