"""The training loop for every stage, on one process or several.

A step's rows are joined to packs (`pumice.data.packing`). One step: run each pack forward and backward, with
its summed loss divided by the supervised tokens of the whole step; then clip the gradients and update the
weights.

Resume is bit-exact: every random draw depends on the recipe's seed and the step alone, or on a generator
whose state is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from pumice.data.packing import Pack, Tree
from pumice.errors import InputError, WorkError, counted
from pumice.formats.load import find_device
from pumice.formats.pumice.folder import CONFIG
from pumice.kernels.allocator import keep_freed_memory
from pumice.processor import Sample
from pumice.stopping import at_signal
from pumice.train import checkpoint as checkpoints
from pumice.train.answers import answer
from pumice.train.batches import Batch, Batches, prefetch
from pumice.train.devices import enough_memory, for_device, numerics, peak
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.gradients import GradientWatch
from pumice.train.memory import checkpoint_blocks
from pumice.train.objective import Objective, PackTensors
from pumice.train.optim import clip, gradient_norms, make_optimizer, schedule
from pumice.train.parallel import World
from pumice.train.preflight import check_device, preflight
from pumice.train.provenance import changed_code, code_digests, content_digests, is_own, versions
from pumice.train.recipe import Recipe
from pumice.train.report import CHECKPOINTS, PLOT, TrainingReport, draw_loss, output_folder
from pumice.train.setup import Setup, prepare
from pumice.train.speed import flops_per_prediction, flops_per_tile, flops_per_token
from pumice.train.trackers import check_installed
from pumice.video import PICTURE_FRAMES

# Recipe fields that may differ when a run is resumed: they do not change its result.
MUTABLE_FIELDS = {
    "name", "output", "pictures", "device", "feature_cache", "max_bad_rows", "held_out",
    "save_every", "keep_last", "measure_every", "measure_rows", "sample_answers",
    "checkpointing", "parallel", "workers", "compile", "trackers",
}  # fmt: skip
FIXED_APART = {*MUTABLE_FIELDS, "shuffle_block"}  # not compared as the recipe has them


def train(recipe: Recipe, trainer: type[Trainer] | None = None) -> Path:
    """Train what a recipe describes and return the folder of the finished model.

    trainer: a subclass of Trainer, for another objective or schedule.
    """
    with World.join(recipe) as world:
        check_installed(recipe)
        device = find_device(world.device(recipe))
        recipe = for_device(recipe, device.type)
        check_device(recipe, device, world)
        with numerics(recipe, device):
            torch.manual_seed(recipe.seed)
            setup = prepare(recipe, str(device), world.load_on)
            return (trainer or Trainer)(recipe, setup, world).run()


@dataclass(frozen=True)
class PreparedStep:
    """The input of one step: this process's packs, and totals over all processes."""

    packs: list[PackTensors]
    total_packs: int
    tokens: int
    flops: float  # operations of the step's matrix products


class Trainer:
    """One run: its model, batches, optimiser and checkpoints.

    A subclass may name another objective, or other learning rates. A resumed run must have the same classes,
    by name; that their files changed is told.
    """

    objective_class: type[Objective] = Objective

    def __init__(self, recipe: Recipe, setup: Setup, world: World | None = None) -> None:
        # 1. The device: keep freed memory on a CPU.
        self.recipe, self.setup, self.world = recipe, setup, world or World()
        self.model, self.device = setup.model, setup.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.world.share(self.model.tower, self.device)
        # 2. The data. The model's config records how many images a row of this stage shows.
        self.batches = Batches(recipe, setup.processor, self.world.size)
        frames = PICTURE_FRAMES if setup.model.config.video is None else 1
        setup.record_max_images(self.batches.mixture.max_images(frames))
        # 3. Tower features, cached on disk if asked. One process writes a cache, so each has its own folder.
        cache = recipe.feature_cache
        if cache is not None and self.world.size > 1:
            cache = cache / f"process-{self.world.rank}"
        self.features = TowerFeatures(self.model, setup.processor, cache, recipe.stage.learns("tower"))
        # 4. The objective, wrapped for one process or many, and the optimiser of the trainable parameters.
        self.objective = self.objective_class(
            self.model, self.features, recipe.precision == "bf16", use_all_parts=self.world.size > 1
        )
        self._flop_costs = (
            flops_per_token(self.model, setup.part_of),
            flops_per_prediction(self.model, setup.part_of),
            flops_per_tile(self.model),
        )
        self.wrapped_objective = self._wrap_objective()
        parameters = self.model.named_parameters()
        self.trainable = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.optimizer = make_optimizer(recipe, self.trainable, setup.part_of, self.device)
        # 5. Shards of gradients say nothing of whole parameters, so FSDP is not watched.
        self._watch = GradientWatch({} if self.world.kind == "fsdp" else self.trainable, setup.part_of)
        # 6. The state that checkpoints save: counters, and what a resumed run must have in common.
        self.step = self.tokens = 0
        self.notes: list[str] = []  # on what is odd about a new run
        self.digests = content_digests(recipe, self.batches.mixture.rows)
        self.fixed_fields = recipe.stored(exclude=FIXED_APART)
        if (block := self.batches.mixture.shuffle_block) != 1:  # 1 is what older versions did
            self.fixed_fields["shuffle_block"] = block
        self.fixed_fields |= {"steps": self.batches.steps, **self.digests}
        classes = (type(self), self.objective_class)
        for (key, usual), code in zip(checkpoints.CLASSES.items(), classes, strict=True):
            name = code.__name__
            self.fixed_fields[key] = f"own {name}" if name == usual and is_own(code) else name
        self._code = code_digests(classes)

    def _wrap_objective(self) -> nn.Module:
        """Set up the blocks as the recipe says, and wrap the objective for DDP or FSDP.

        Blocks may be compiled, and may compute activations again instead of saving them (`checkpointing`).
        """
        recipe, world, tower = self.recipe, self.world, self.model.tower
        blocks: list[Any] = [*self.model.decoder.blocks]
        if recipe.compile:
            for block in blocks:
                # Attention itself is not compiled: its structure differs from pack to pack.
                block.attention_norm.compile(dynamic=True)
                block.attention.project = torch.compile(block.attention.project, dynamic=True)
                block.feed_forward = torch.compile(block.feed_forward, dynamic=True)
        if self.features.trains_tower:
            blocks += getattr(tower, "blocks", ())
        checkpoint_blocks(blocks, recipe.checkpointing)
        # A frozen tower is not sharded: processes call it a different number of times.
        unsharded = [] if self.features.trains_tower else [tower]
        wrapped = world.wrap(self.objective, blocks, unsharded, self.device)
        if world.size > 1:
            torch.manual_seed(recipe.seed + world.rank)  # dropout differs between processes
        return wrapped

    def run(self) -> Path:
        """Train to the last step and return the model's folder; resume from the newest checkpoint, if any.

        SIGINT or SIGTERM saves a checkpoint after the current step, then raises KeyboardInterrupt. Before and
        after all steps it does so at once.
        """
        # 1. Make the output folder, and lock it so that no second run writes there.
        output = self.recipe.output
        folder = output / CHECKPOINTS
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(self.features))
            if self.world.main:
                stack.enter_context(at_signal())  # so that the folder is cleared; `_train` has its own
                stack.enter_context(output_folder(output, lambda: self.step > 0))
            # 2. Resume from the newest checkpoint. A new run is checked before any compute is spent on it.
            resumed = self._resume(folder)
            model = output / "model"
            if resumed and self.step == self.batches.steps and (model / CONFIG).is_file():
                print(f"already finished: step {self.step} of {self.step}", file=sys.stderr)
                if self.world.main and not (output / PLOT).is_file():
                    draw_loss(output)
                return model
            if not resumed and self.world.main:
                self.notes = preflight(self.setup, self.batches)
            # 3. Save the model once for trial: a run must not fail at its end because it cannot be saved.
            state = self.world.full_state(self.model)
            if self.world.main:
                self.setup.save_and_compare(state)
            del state
            with enough_memory(self.recipe):
                return self._train(folder)

    def _resume(self, folder: Path) -> bool:
        """Go on from the newest checkpoint, which is freed again; return whether there is one."""
        checkpoint = checkpoints.latest(
            folder, self.fixed_fields, self.trainable, self.device, self.world, self._complete
        )
        if checkpoint is not None:
            self._restore(checkpoint)
        return checkpoint is not None

    def _complete(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Return a stored recipe with the defaults of fields that were added since, in lists as well."""
        own = {name: value for name, value in stored.items() if name in Recipe.model_fields}
        current = self.recipe.model_dump(include=MUTABLE_FIELDS)
        try:
            recipe = Recipe.model_validate(current | own)
        except ValidationError:  # such as a field that is gone: the comparison names it
            return checkpoints.CLASSES | stored
        return checkpoints.CLASSES | stored | recipe.stored(exclude=FIXED_APART)

    def _train(self, folder: Path) -> Path:
        """Run the steps that remain, with their measurements and checkpoints, and save the model."""
        last = self.batches.steps
        measure_every = self.recipe.measure_every or min(100, max(1, last // 10))
        report = self._open_report()
        signals: list[int] = []  # a first one lets the current step finish
        with report, at_signal(signals.append):
            # 1. Measure the untrained model, so that the report can compare before and after.
            if self.step == 0:
                self._measure(report)
            # 2. Threads read rows and decode images of the next steps while this one computes.
            steps = prefetch(self._prepare_step, self.step, last, self.recipe.workers)
            with contextlib.closing(steps):
                for prepared in steps:
                    # 3. One optimiser step, with its numbers in the report.
                    started = time.perf_counter()
                    values = self._train_step(prepared)
                    self.step += 1
                    self.tokens += prepared.tokens
                    seconds = time.perf_counter() - started
                    report.step(self.step, values, prepared.tokens, seconds, prepared.flops)
                    if self.step % measure_every == 0 or self.step == last:
                        self._measure(report)
                    # 4. Save. All processes stop after the same step, also if only one got the signal.
                    stop_now = bool(signals) if self.world.size == 1 else self.world.sum(len(signals))[0] > 0
                    if stop_now or self.step % self.recipe.save_every == 0 or self.step == last:
                        self._save(folder)
                    if stop_now and self.step < last:
                        report.print(
                            f"Saved at step {self.step} of {last}. Run the same command to continue."
                        )
                        raise KeyboardInterrupt
        # 5. Write the finished model. Under FSDP every process takes part in gathering its tensors.
        model = self.recipe.output / "model"
        state = self.world.full_state(self.model)
        if self.world.main:
            self.setup.save(model, self._summary(report), state)
            draw_loss(self.recipe.output)
        self.world.barrier()
        return model

    def _open_report(self) -> TrainingReport:
        recipe = self.recipe
        if not self.world.main:
            return TrainingReport(recipe, [], self.step, self.batches.steps, None, enabled=False)
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        lines = self.setup.describe(self.batches.steps, min(recipe.batch, self.batches.pictures))
        lines += [f"  {note}" for note in self.notes]
        if added := self.batches.added:
            naming = counted(added, "row", "name")
            lines.append(f"  {naming} pictures without <image>; it stands before the first question")
        if self.world.size > 1:
            kinds = {"ddp": "a copy of the model each (DDP)", "fsdp": "the model in shards (FSDP)"}
            lines.append(f"  {self.world.size} processes, {kinds[self.world.kind]}")
        peak_flops = peak(self.device, dtype) * self.world.size
        return TrainingReport(recipe, lines, self.step, self.batches.steps, peak_flops)

    def _prepare_step(self, step: int) -> PreparedStep:
        """Read a step's rows and images, in a thread, before the step runs."""
        batch = self.batches[step]
        packs = self._own_packs(batch)
        # Tokens, predictions and tiles, in the order of `_flop_costs`.
        counts = (
            batch.tokens,
            sum(len(pack.targets) for pack, _ in batch.packs),
            sum(layout.tiles for pack, _ in batch.packs for layout in pack.layouts),
        )
        flops = sum(count * cost for count, cost in zip(counts, self._flop_costs, strict=True))
        return PreparedStep(packs, len(batch.packs), batch.tokens, flops)

    def _own_packs(self, batch: Batch) -> list[PackTensors]:
        """Return this process's packs, with dummies so that every process has the same number."""
        rank, size = self.world.rank, self.world.size
        packs = [self._load_pack(pack, mirrored) for pack, mirrored in batch.packs[rank::size]]
        packs_per_process = -(-len(batch.packs) // size)  # rounded up
        missing = packs_per_process - len(packs)
        return packs + [PackTensors.dummy()] * missing

    def _load_pack(self, pack: Pack, mirrored: list[bool]) -> PackTensors:
        """Read a pack's images. Leave out trees whose images cannot be read, and count them as bad rows.

        A tree holds rows about the same images. mirrored: for each tree, whether its images are mirrored.
        """
        pin = self.device.type == "cuda"
        trees: list[Tree] = []
        images: list[ImageInput] = []
        for tree, mirror in zip(pack.trees, mirrored, strict=True):
            try:
                images += self.features.fetch(tree.images, tree.layouts, mirror, pin)
                trees.append(tree)
            except InputError as error:
                self.batches.skipped.add(", ".join(image.name for image in tree.images), error)
        if not trees:
            return PackTensors.dummy()
        return PackTensors.of(pack if len(trees) == len(pack.trees) else Pack.of(trees), images, pin)

    def _train_step(self, prepared: PreparedStep) -> dict[str, Any]:
        """Run one optimiser step and return its numbers. Raises WorkError when the loss is not finite."""
        # 1. Set this step's learning rates: the share `rate` of each part's highest one, `peak`.
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.rate(group["part"])
        rate = schedule(self.step, self.batches.steps, self.recipe.warmup)
        self.model.train()
        world = self.world
        # 2. Count the supervised tokens of the whole step first: each must weigh the same, in any pack.
        counts = (sum(pack.supervised for pack in prepared.packs), sum(len(p.images) for p in prepared.packs))
        supervised, images = world.sum(*counts)
        losses = []
        for number, pack in enumerate(prepared.packs, 1):
            scale = 1 / max(supervised, 1)
            if self.recipe.loss_average == "micro_batch":
                scale = 1 / (max(pack.supervised, 1) * prepared.total_packs)
            # 3. Run one pack at a time: memory holds one pack's activations. Gradients add up.
            with world.accumulate(last=number == len(prepared.packs)):
                loss = self.wrapped_objective(pack) * scale
                # Without images there is no graph when only the connector learns.
                if loss.requires_grad:
                    # DDP and FSDP average gradients over processes; the size turns that into a sum.
                    (loss * world.size if world.size > 1 else loss).backward()
            losses.append(loss.detach())
        if not images:
            self._forget_zeros()
        # 4. Check loss and gradients before the update, so that a diverged step leaves the weights intact.
        [total] = world.sum(sum(torch.stack(losses).tolist() if losses else ()))
        norms = gradient_norms(self.optimizer, world)
        norm = math.sqrt(sum(part**2 for part in norms.values()))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise WorkError(
                f"step {self.step + 1}: the loss is {total}, its gradient's norm {norm}; "
                "start again with a lower learning rate in another output folder"
            )
        if any(pack.images for pack in prepared.packs) or self.batches.mixture.max_images() == 0:
            self._watch.check({group["part"] for group in self.optimizer.param_groups if group["lr"]})
        # 5. Clip by the norm over all parts, then update.
        clip(self.optimizer, norm, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        parts = {f"gradient_norm/{part}": value for part, value in norms.items()} if len(norms) > 1 else {}
        return {"loss": total, "gradient_norm": norm, **parts, "rate": rate, "supervised": supervised}

    def _forget_zeros(self) -> None:
        """Remove the zero gradients that many processes need in a step without images.

        One process has none there, and AdamW moves a weight whose gradient is zero.
        """
        for group in self.optimizer.param_groups:
            # A part may be some blocks of the tower: tower.20-22.
            if group["part"].partition(".")[0] in ("tower", "connector", "image_newline"):
                for parameter in group["params"]:
                    parameter.grad = None

    def rate(self, part: str) -> float:
        """Return the share of a part's peak learning rate in this step. Override it for another schedule."""
        return schedule(self.step, self.batches.steps, self.recipe.warmup)

    @torch.no_grad()
    def _measure(self, report: TrainingReport) -> None:
        """Report the held-out loss and sample answers; do nothing without held-out rows."""
        if not self.recipe.held_out:
            return
        self.model.eval()
        packs = self._own_packs(self.batches.held_out)
        own_loss = sum(self.wrapped_objective(pack).item() for pack in packs)
        loss, supervised = self.world.sum(own_loss, sum(pack.supervised for pack in packs))
        report.held_out(self.step, loss / max(supervised, 1))
        for sample, question, reference in self.batches.questions(self.recipe.sample_answers):
            # Sharded weights have to be gathered by all processes; copies answer on the first alone.
            if self.world.main or self.world.kind == "fsdp":
                report.answer(self.step, question, reference, self._answer(sample))

    def _answer(self, sample: Sample) -> str:
        """Answer a prompt greedily with the current weights."""
        tokens = answer(sample, self.objective, self.wrapped_objective, self.world)
        text = self.setup.processor.tokenizer.decode(tokens)
        return text.partition(self.setup.processor.template.stop)[0]

    def _save(self, folder: Path) -> None:
        """Write a checkpoint: everything that the next step depends on."""
        rng = {"cpu": torch.get_rng_state(), "threads": torch.tensor(torch.get_num_threads())}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        # Of the optimiser, tensors (`moments`) and numbers (`plain`) are stored apart.
        moments, plain = checkpoints.optimizer_state(self.optimizer, self.trainable)
        checkpoint = checkpoints.Checkpoint(
            step=self.step,
            weights={name: weight.detach().contiguous() for name, weight in self.trainable.items()},
            moments=moments,
            plain=plain,
            rng=rng,
            recipe=self.fixed_fields,
            # A copy: the thread that prepares the next step may add a bad row while this is written.
            progress={"tokens": self.tokens, "skipped": dict(self.batches.skipped.reasons), **self._code},
        )
        checkpoints.save(folder, checkpoint, self.recipe.keep_last, self.world)

    def _restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Put weights, optimiser, random generators and counters back as the checkpoint has them."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(checkpoint.weights[name])
        checkpoints.restore_optimizer(self.optimizer, self.trainable, checkpoint)
        if "cpu" in checkpoint.rng:
            torch.set_rng_state(checkpoint.rng["cpu"])
        if "cuda" in checkpoint.rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.rng["cuda"], self.device)
        self.step, self.tokens = checkpoint.step, checkpoint.progress["tokens"]
        self.batches.skipped.reasons.update(checkpoint.progress["skipped"])
        if self.step == self.batches.steps:  # nothing is left that another computer would compute differently
            return
        if self.world.main and (changes := changed_code(checkpoint.progress, self._code)):
            print("\n".join(changes), file=sys.stderr)
        threads = torch.get_num_threads()
        stored = int(checkpoint.rng.get("threads", threads))
        if self.world.main and self.device.type == "cpu" and stored != threads:
            print(
                f"This run had {counted(stored, 'thread')} and has {threads} now: sums round in another "
                "order, so its weights may differ in the last digits. "
                f"OMP_NUM_THREADS={stored} continues it bit for bit.",
                file=sys.stderr,
            )

    def _summary(self, report: TrainingReport) -> dict[str, Any]:
        return {
            "recipe": self.recipe.stored(),
            "steps": self.step,
            "tokens": self.tokens,
            "skipped_rows": len(self.batches.skipped.reasons),
            "processes": self.world.size,
            "digests": self.digests,
            "versions": versions(),
            "answers": report.answers(),
        }
