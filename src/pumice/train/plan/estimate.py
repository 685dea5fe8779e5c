"""Memory and time of a recipe before it runs.

Knows recipes, shapes of models and devices. Does not know how a step computes: `footprint` runs one without
contents; nor what is refused (`preflight`). On a device that is not here the rate of its products is the
maker's, times a share that dense training reaches; on this machine products are timed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pumice.config import ModelConfig
from pumice.errors import InputError, WorkError
from pumice.formats.load import find_device
from pumice.geometry import image_layout
from pumice.model.packed import Run
from pumice.train.batches import Batches
from pumice.train.devices import GB, GPUS, peak, total_memory
from pumice.train.parallel import MAX_COPY_SHARE
from pumice.train.plan.footprint import Footprint, PackShape, measure
from pumice.train.recipe import Recipe
from pumice.train.shapes import processor_of, shape
from pumice.train.sizes import Sizes, sizes

REACHED = 0.4  # share of a GPU's products that dense training of this size reaches; not measured here
REACHED_HERE = 0.6  # share of the timed products that a step reaches on a CPU (benchmarks/plan.py)
TEXT = 160  # tokens of text beside a picture, where no rows are here to tell: mix665K's mean
SUPERVISED = 0.4  # share of them that is learned
FRAMEWORK = {"cpu": 0.36 * GB, "cuda": 0.8 * GB}  # Python, PyTorch and its libraries (measured on the CPU)
SLACK = {"cpu": 1.6, "cuda": 1.08}  # what allocators hold beyond what is alive (cpu: glibc's, measured)
STEPS_LOOKED_AT = 12


@dataclass(frozen=True)
class Device:
    """Where the run would compute."""

    name: str
    kind: str  # cpu | cuda | mps
    memory: float | None  # bytes; None where it cannot be told
    rate: float  # operations per second that training reaches


@dataclass
class Plan:
    """What a recipe takes. Memory in bytes per process, times in seconds."""

    recipe: str
    device: Device
    processes: int
    sharded: bool
    parameters: dict[str, int]
    learning: int
    memory: dict[str, float]  # kind -> bytes
    total: float
    pack_tokens: int  # as the recipe says
    largest_pack: int | None  # tokens that fit; None where memory is unknown, 0 when nothing does
    checkpoint: float  # bytes on disk of one checkpoint
    disk: float  # bytes on disk of checkpoints and model
    tokens_per_second: float  # all processes
    steps: int | None
    steps_per_epoch: int | None
    seconds: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        return None if self.device.memory is None else self.total <= self.device.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"fits": self.fits}


def plan(
    recipe: Recipe,
    path: Path | None = None,
    *,
    gpu: str | None = None,
    gpu_memory: float | None = None,
    processes: int = 1,
    rows: int | None = None,
) -> Plan:
    """What the recipe takes on a named GPU, or here.

    path: of the recipe, to find the one before it. gpu_memory: in GB. rows: of an epoch, where they are not
    here. Neither weights nor rows need be here; what was assumed instead stands in the notes. Raises
    InputError on an unknown GPU and on a model whose shape nothing tells.
    """
    config, notes = shape(recipe, path)
    device = describe_device(recipe, gpu, gpu_memory)
    works, steps, per_epoch, share = _works(recipe, config, rows, notes)
    largest = max(works, key=lambda work: (work.tokens, work.tiles))
    kind = "cpu" if device.kind == "cpu" else "cuda"
    if device.kind == "mps":
        notes.append("no run on mps was measured yet: memory is planned as on a CUDA GPU")
    held = sizes(recipe, config, kind)
    found = measure(recipe, config, largest, kind)
    double = measure(recipe, config, _twice(largest), kind)
    sharded = _sharded(recipe, held, device, processes)
    memory = _memory(recipe, config, held, found, kind, processes if sharded else 1)
    total = sum(memory.values())
    fitting = None
    if device.memory is not None:
        grown = sum(_memory(recipe, config, held, double, kind, processes if sharded else 1).values())
        slope = max((grown - total) / largest.tokens, 1.0)  # small packs may hide behind the weights' copies
        fitting = min(max(0, int(largest.tokens + (device.memory - total) / slope)), 16 * largest.tokens)
        fitting = fitting // 64 * 64 if fitting >= largest.runs[0].length else 0
    per_token = found.flops / largest.tokens
    tiles = sum(work.tiles for work in works) / sum(work.tokens for work in works)
    if recipe.feature_cache is None and "tower" not in recipe.stage.learn:
        per_token += found.tower_flops * tiles
    speed = device.rate / per_token * processes
    return Plan(
        recipe=recipe.name, device=device, processes=processes, sharded=sharded,
        parameters=held.parameters, learning=held.learning, memory=memory, total=total,
        pack_tokens=recipe.pack_tokens, largest_pack=fitting, checkpoint=held.checkpoint,
        disk=held.disk(recipe.keep_last), tokens_per_second=speed, steps=steps, steps_per_epoch=per_epoch,
        seconds=None if steps is None else steps * share / speed, notes=notes,
    )  # fmt: skip


def describe_device(recipe: Recipe, gpu: str | None = None, gpu_memory: float | None = None) -> Device:
    """A GPU by name or by its memory, or the device that the recipe would take here."""
    if gpu is None and gpu_memory is not None:
        gpu = "rtx4090" if gpu_memory <= 24 else "l40s" if gpu_memory <= 48 else "a100-80g"
        return dataclasses.replace(
            describe_device(recipe, gpu),
            name=f"a GPU of {gpu_memory:g} GB like {gpu}",
            memory=gpu_memory * GB,
        )
    if gpu is not None:
        if gpu.lower() not in GPUS:
            raise InputError(f"there is no GPU {gpu!r} in the table; known are {', '.join(GPUS)}")
        known = GPUS[gpu.lower()]
        given = known.memory if gpu_memory is None else gpu_memory
        slower = 1.0 if recipe.precision == "bf16" else 0.5  # tf32; fp32 without it is slower still
        return Device(gpu.lower(), "cuda", given * GB, known.rate * 1e12 * REACHED * slower)
    device = find_device(recipe.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"this machine ({device})"
    most = peak(device, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    return Device(name, device.type, total_memory(device), most * (REACHED if on_gpu else REACHED_HERE))


def _memory(
    recipe: Recipe, config: ModelConfig, held: Sizes, found: Footprint, kind: str, shards: int
) -> dict[str, float]:
    """Bytes of one process by kind. shards: over how many processes weights and states are split."""
    gathered = 2 * held.weights / config.decoder.depth if shards > 1 else 0.0  # one block used, one fetched
    alive = SLACK[kind]
    return {
        "weights": held.weights / shards + gathered,
        "gradients": held.gradients / shards,
        "optimiser": held.optimizer / shards,
        "activations": max(0.0, found.activations - found.logits) * alive,
        "logits": found.logits * alive,
        "picture": 0.0 if "tower" in recipe.stage.learn else found.picture,
        "framework": FRAMEWORK[kind],
        # from which they are copied when the model is saved, with all the rest there
        "files": held.files if kind == "cpu" else 0.0,
    }


def _sharded(recipe: Recipe, held: Sizes, device: Device, processes: int) -> bool:
    """As `World.choose` settles it."""
    if processes == 1 or recipe.parallel != "auto":
        return processes > 1 and recipe.parallel == "fsdp"
    return device.kind == "cuda" and device.memory is not None and held.held > MAX_COPY_SHARE * device.memory


def _works(
    recipe: Recipe, config: ModelConfig, rows: int | None, notes: list[str]
) -> tuple[list[PackShape], int | None, int | None, float]:
    """Packs to plan for, steps, steps per epoch, tokens of a step."""
    lacking = [s.rows for s in recipe.data if not s.rows.exists()]
    lacking += [folder for folder in recipe.pictures if not folder.exists()]
    if not lacking:
        try:
            return _from_rows(recipe)
        except (InputError, WorkError) as error:
            notes.append(f"the rows were not read ({error})")
    else:
        notes.append(
            f"{lacking[0]} is not here: samples of {TEXT} tokens of text beside a picture are assumed"
        )
    work = assumed(recipe, config)
    length = work.runs[0].length
    if rows is None:
        return [work], None, None, 0.0
    per_epoch = math.ceil(rows / recipe.batch)
    steps = math.ceil(rows * recipe.epochs / recipe.batch)
    return [work], min(steps, recipe.max_steps or steps), per_epoch, float(length * recipe.batch)


def assumed(recipe: Recipe, config: ModelConfig) -> PackShape:
    """A pack full of samples with one picture each, as no rows tell otherwise."""
    staged = recipe.stage_config(config)
    layout = image_layout(staged, (1024, 768))
    length = min(layout.tokens + TEXT, staged.decoder.context)
    count = max(1, recipe.pack_tokens // length)
    return PackShape(
        (Run(length),) * count, count * layout.tiles, count * layout.tokens, count * int(TEXT * SUPERVISED)
    )


def _from_rows(recipe: Recipe) -> tuple[list[PackShape], int, int, float]:
    batches = Batches(recipe, processor_of(recipe))
    looked = sorted({round(n * (batches.steps - 1) / STEPS_LOOKED_AT) for n in range(STEPS_LOOKED_AT + 1)})
    works, tokens = [], 0
    for step in looked:
        batch = batches[step]
        tokens += batch.tokens
        for packed, _ in batch.packs:
            works.append(
                PackShape(
                    tuple(packed.runs),
                    sum(layout.tiles for layout in packed.layouts),
                    sum(layout.tokens for layout in packed.layouts),
                    len(packed.sources),
                )
            )
    per_epoch = math.ceil(batches.steps / recipe.epochs) if recipe.epochs > 1 else batches.steps
    return works, batches.steps, per_epoch, tokens / len(looked)


def _twice(work: PackShape) -> PackShape:
    shift = len(work.runs)
    again = tuple(Run(r.length, tuple((n + shift, k) for n, k in r.before)) for r in work.runs)
    return PackShape((*work.runs, *again), 2 * work.tiles, 2 * work.image_tokens, 2 * work.supervised)
