"""Estimate the memory and time that a recipe needs, before it runs.

On this machine the speed of matrix products is timed. For a named GPU it is the manufacturer's peak, times
a share that is assumed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pumice.config import ModelConfig
from pumice.data.sources.recognise import is_missing
from pumice.errors import InputError, WorkError, finite
from pumice.formats.load import check_bf16, find_device
from pumice.geometry import image_layout
from pumice.model.packed import Run
from pumice.storage.memory import GB
from pumice.train.batches import Batches
from pumice.train.devices import find_gpu, for_device, gpus, peak, thread_notes, total_memory
from pumice.train.parallel import check_shardable, needs_shards
from pumice.train.plan.footprint import Footprint, PackShape, measure
from pumice.train.recipe import Recipe
from pumice.train.shapes import check_base, processor_of, shape
from pumice.train.sizes import Sizes, sizes

GPU_UTILISATION = 0.4  # share of a GPU's peak that a step reaches: assumed, as none was measured yet
CPU_UTILISATION = 0.6  # share of the timed products that a step reaches on a CPU (benchmarks/plan.py)
TEXT_TOKENS = 160  # tokens of text beside a picture, assumed without rows: mix665K's mean
SUPERVISED_SHARE = 0.4  # share of these tokens that is supervised
FRAMEWORK = {"cpu": 0.36 * GB, "cuda": 0.8 * GB}  # Python, PyTorch and its libraries (measured on the CPU)
SLACK = {"cpu": 1.6, "cuda": 1.08}  # allocated memory per byte in use (cpu: glibc's allocator, measured)
SAMPLED_STEPS = 12  # steps of the run whose packs are read
EXTRAPOLATED = 16  # times the measured pack: how far the memory of larger packs is foretold


@dataclass(frozen=True)
class Device:
    """The device on which the run would compute."""

    name: str
    kind: str  # cpu | cuda | mps
    memory: float | None  # bytes; None where unknown
    rate: float  # operations per second that training reaches


@dataclass
class Plan:
    """What a recipe needs: memory in bytes per process, times in seconds."""

    recipe: str
    device: Device
    processes: int
    sharded: bool
    parameters: dict[str, int]
    learning: int
    memory: dict[str, float]  # kind -> bytes
    total: float
    pack_tokens: int  # as the recipe says
    planned_pack: int  # tokens of the largest pack of the rows, for which memory is planned
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
        """Return plain values for JSON."""
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
    """Estimate what the recipe needs on a named GPU, or on this machine.

    path: the recipe's file, to find the recipe of the stage before it. gpu_memory: in GB. rows: the number of
    rows of an epoch, where their files are not on this machine. Weights and rows need not be on this machine;
    the notes say what was assumed instead.

    Raises InputError on an unknown GPU, on a model whose shape cannot be found, and on shards of what cannot
    be sharded.
    """
    # 1. Find the model's shape, the device, and the packs that the run would compute.
    config, notes = shape(recipe, path)
    if any("." in part for part in recipe.stage.learn):
        notes.append("activations and time are counted as if all blocks of the part learned")
    device = describe_device(recipe, gpu, gpu_memory)
    notes += thread_notes(device.kind)
    recipe = for_device(recipe, device.kind)
    packs, steps, per_epoch, step_tokens = _packs(recipe, path, config, rows, notes, processes)
    largest = max(packs, key=lambda pack: (pack.tokens, pack.tiles))
    kind = "cpu" if device.kind == "cpu" else "cuda"
    if device.kind == "mps":
        notes.append("no run on mps was measured yet: memory is planned as on a CUDA GPU")
    # 2. Memory: what the run holds from step to step, and what its largest pack adds.
    stage_sizes = sizes(recipe, config, kind)
    sharded = processes > 1 and recipe.parallel == "fsdp"
    if processes > 1 and recipe.parallel == "auto" and device.kind == "cuda" and device.memory is not None:
        sharded = needs_shards(stage_sizes.model_states, device.memory)
    if sharded:
        check_shardable(recipe)
    footprint = measure(recipe, config, largest, kind)
    shards = processes if sharded else 1
    memory = _memory(recipe, stage_sizes, footprint, kind, shards)
    total = sum(memory.values())
    # 3. The largest pack that fits. Activations grow linearly with the tokens, so two sizes give the slope.
    fitting_tokens = None
    if device.memory is not None:
        double = measure(recipe, config, _doubled(largest), kind)
        double_total = sum(_memory(recipe, stage_sizes, double, kind, shards).values())
        # With a small pack the peak may be copies of the weights. The slope is then zero: assume a byte.
        bytes_per_token = max((double_total - total) / largest.tokens, 1.0)
        fitting_tokens = max(0, int(largest.tokens + (device.memory - total) / bytes_per_token))
        fitting_tokens = min(fitting_tokens, EXTRAPOLATED * largest.tokens)
        # A pack that cannot hold one sample is no use.
        fitting_tokens = fitting_tokens // 64 * 64 if fitting_tokens >= largest.runs[0].length else 0
        if total <= device.memory:
            fitting_tokens = max(fitting_tokens, largest.tokens)
    # 4. Speed. A frozen tower runs outside the measured step, and with a feature cache only once per image.
    flops_per_token = footprint.flops / largest.tokens
    tiles_per_token = sum(pack.tiles for pack in packs) / sum(pack.tokens for pack in packs)
    if recipe.feature_cache is None and not recipe.stage.learns("tower"):
        flops_per_token += footprint.tower_flops * tiles_per_token
    speed = device.rate / flops_per_token * processes
    return Plan(
        recipe=recipe.name, device=device, processes=processes, sharded=sharded,
        parameters=stage_sizes.parameters, learning=stage_sizes.learning, memory=memory, total=total,
        pack_tokens=recipe.pack_tokens, planned_pack=largest.tokens, largest_pack=fitting_tokens,
        checkpoint=stage_sizes.checkpoint,
        disk=stage_sizes.disk(recipe.keep_last), tokens_per_second=speed,
        steps=steps, steps_per_epoch=per_epoch,
        seconds=None if steps is None else steps * step_tokens / speed, notes=notes,
    )  # fmt: skip


def describe_device(recipe: Recipe, gpu: str | None = None, gpu_memory: float | None = None) -> Device:
    """Describe a GPU by its name or its memory, or the device that the recipe would use on this machine.

    gpu_memory: in GB. Raises InputError on an unknown GPU, and on a bf16 recipe for one without bf16.
    """
    # Without a name, a common GPU of that memory gives the speed.
    if gpu_memory is not None and finite(gpu_memory, "the memory of a GPU in GB") <= 0:
        raise InputError(f"the memory of a GPU is {gpu_memory} GB; give more than 0")
    if gpu is None and gpu_memory is not None:
        gpu = "rtx4090" if gpu_memory <= 24 else "l40s" if gpu_memory <= 48 else "a100-80g"
        return dataclasses.replace(
            describe_device(recipe, gpu),
            name=f"a GPU of {gpu_memory:g} GB like {gpu}",
            memory=gpu_memory * GB,
        )
    if gpu is not None:
        try:
            gpu = find_gpu(gpu)
        except InputError:
            if gpu_memory is None:
                raise
            return describe_device(recipe, gpu_memory=gpu_memory)
        gpu_spec = gpus()[gpu]
        memory_gb = gpu_spec.memory if gpu_memory is None else gpu_memory
        if recipe.precision == "bf16" and not gpu_spec.has_bf16:  # which training would refuse
            raise InputError(f"a {gpu} does not compute in bf16; use precision: fp32")
        # Products take so many times as long as in bf16.
        times = {
            "bf16": 1,
            "tf32": 2 if gpu_spec.has_bf16 else gpu_spec.fp32_part,
            "fp32": gpu_spec.fp32_part,
        }
        rate = gpu_spec.rate * 1e12 * GPU_UTILISATION / times[recipe.precision]
        return Device(gpu, "cuda", memory_gb * GB, rate)
    device = find_device(recipe.device)
    if recipe.precision == "bf16":
        check_bf16(device, "use precision: fp32")
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"this machine ({device})"
    peak_rate = peak(device, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    utilisation = GPU_UTILISATION if on_gpu else CPU_UTILISATION
    return Device(name, device.type, total_memory(device), peak_rate * utilisation)


def _memory(
    recipe: Recipe, stage_sizes: Sizes, footprint: Footprint, kind: str, shards: int
) -> dict[str, float]:
    """Return the bytes of one process by kind. shards: the processes that share weights and states."""
    whole, gathered = (stage_sizes.shards.whole, stage_sizes.shards.gathered) if shards > 1 else (0.0, 0.0)
    slack = SLACK[kind]
    return {
        "weights": (stage_sizes.weights - whole) / shards + whole + gathered,
        "gradients": stage_sizes.gradients / shards,
        "optimiser": stage_sizes.optimizer / shards,
        "activations": max(0.0, footprint.activations - footprint.logits) * slack,
        "logits": footprint.logits * slack,
        "picture": 0.0 if recipe.stage.learns("tower") else footprint.tower_pass,
        "framework": FRAMEWORK[kind],
        # On a CPU, pages of the weights' files stay in memory when the model is saved from them.
        "files": stage_sizes.files if kind == "cpu" else 0.0,
    }


def _packs(
    recipe: Recipe,
    path: Path | None,
    config: ModelConfig,
    rows: int | None,
    notes: list[str],
    processes: int,
) -> tuple[list[PackShape], int | None, int | None, float]:
    """Return (packs to plan for, steps, steps per epoch, tokens of a step); steps are None where unknown."""
    missing = [Path(s.rows) for s in recipe.data if is_missing(s.rows)]
    missing += [folder for folder in recipe.pictures if not folder.exists()]
    if not missing:
        try:
            if path is not None:
                check_base(recipe, path)
            return _from_rows(recipe, processes)
        except (InputError, WorkError) as error:
            notes.append(f"the rows were not read ({error})")
    else:
        notes.append(
            f"{missing[0]} does not exist: samples of {TEXT_TOKENS} tokens of text and a picture assumed"
        )
    pack = assumed_pack(recipe, config)
    length = pack.runs[0].length
    if rows is None:
        return [pack], None, None, 0.0
    per_epoch = math.ceil(rows / recipe.batch)
    steps = math.ceil(rows * recipe.epochs / recipe.batch)
    return [pack], min(steps, recipe.max_steps or steps), per_epoch, float(length * recipe.batch)


def assumed_pack(recipe: Recipe, config: ModelConfig) -> PackShape:
    """Return a full pack of samples with one picture each, for a plan without rows."""
    staged = recipe.stage_config(config)
    layout = image_layout(staged, (1024, 768))
    length = min(layout.tokens + TEXT_TOKENS, staged.decoder.context)
    count = max(1, recipe.pack_tokens // length)
    return PackShape(
        (Run(length),) * count,
        count * layout.tiles,
        count * layout.tokens,
        count * int(TEXT_TOKENS * SUPERVISED_SHARE),
    )


def _from_rows(recipe: Recipe, processes: int) -> tuple[list[PackShape], int, int, float]:
    """Return the packs of some steps of the run, its steps, steps per epoch, and mean tokens of a step."""
    batches = Batches(recipe, processor_of(recipe), processes)
    # Reading every row takes too long, so sample steps evenly from the first to the last.
    sampled = sorted({round(n * (batches.steps - 1) / SAMPLED_STEPS) for n in range(SAMPLED_STEPS + 1)})
    packs, tokens = [], 0
    for step in sampled:
        batch = batches[step]
        tokens += batch.tokens
        for packed, _ in batch.packs:
            packs.append(
                PackShape(
                    tuple(packed.runs),
                    sum(layout.tiles for layout in packed.layouts),
                    sum(layout.tokens for layout in packed.layouts),
                    len(packed.sources),
                )
            )
    per_epoch = math.ceil(batches.steps / recipe.epochs) if recipe.epochs > 1 else batches.steps
    return packs, batches.steps, per_epoch, tokens / len(sampled)


def _doubled(pack: PackShape) -> PackShape:
    """Return a pack with every sample twice. Copied branches refer to the copy of their beginning."""
    shift = len(pack.runs)
    copies = tuple(Run(r.length, tuple((n + shift, k) for n, k in r.before)) for r in pack.runs)
    return PackShape((*pack.runs, *copies), 2 * pack.tiles, 2 * pack.image_tokens, 2 * pack.supervised)
