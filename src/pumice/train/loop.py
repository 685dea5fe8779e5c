"""The one training loop: any stage, on one process or many, resumed by running it again.

Knows the objective, the batches and the optimiser. A step: for each pack, image tokens from features,
one forward pass, the summed loss of the supervised tokens divided by their number in the whole
batch; then clip and step. Every random draw depends on the recipe's seed and the step alone, or on
generators whose state is saved.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from pumice.data.packing import Pack, Tree
from pumice.engine.generate import generate
from pumice.engine.requests import Prompt
from pumice.engine.sampling import SamplingParams
from pumice.errors import InputError, WorkError
from pumice.files import hold
from pumice.kernels.allocator import keep_freed_memory
from pumice.model.packed import Run
from pumice.processor import Sample
from pumice.train import checkpoint as checkpoints
from pumice.train.batches import Batch, Batches, prefetch
from pumice.train.devices import peak
from pumice.train.features import ImageInput, TowerFeatures
from pumice.train.memory import checkpoint_blocks
from pumice.train.objective import Objective, PackTensors
from pumice.train.optim import clip, gradient_norms, make_optimizer, schedule
from pumice.train.parallel import World
from pumice.train.preflight import memory, preflight
from pumice.train.provenance import contents, versions
from pumice.train.recipe import Recipe
from pumice.train.report import TrainingReport
from pumice.train.setup import Setup, prepare
from pumice.train.speed import flops_per_prediction, flops_per_tile, flops_per_token
from pumice.train.trackers import installed

ANSWER_TOKENS = 40  # of a sample answer while training

# fields of a recipe that may change between a run and its continuation without changing its result
MUTABLE_FIELDS = {
    "name", "output", "pictures", "device", "feature_cache", "max_bad_rows", "held_out",
    "save_every", "keep_last", "measure_every", "measure_rows", "sample_answers",
    "checkpointing", "parallel", "workers", "compile", "trackers",
}  # fmt: skip


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end and return the folder of the finished model."""
    torch.manual_seed(recipe.seed)
    world = World.join(recipe)
    try:
        installed(recipe)
        memory(recipe, world.size)
        place = "cpu" if world.kind == "fsdp" else world.device(recipe)
        return Trainer(recipe, prepare(recipe, place), world).run()
    finally:
        world.leave()


@dataclass(frozen=True)
class Ready:
    """One step as this process computes it."""

    works: list[PackTensors]
    packs: int  # of all processes, as is what follows
    tokens: int
    flops: float  # products that it needs


class Trainer:
    def __init__(self, recipe: Recipe, setup: Setup, world: World | None = None) -> None:
        self.recipe, self.setup, self.world = recipe, setup, world or World()
        self.model, self.device = setup.model, setup.device
        if self.device.type == "cpu":
            keep_freed_memory()
        elif recipe.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        self.batches = Batches(recipe, setup.processor, self.world.size)
        setup.trained_on(self.batches.mixture.most_pictures)
        cache = recipe.feature_cache
        if cache is not None and self.world.size > 1:
            cache = cache / f"process-{self.world.rank}"  # each keeps what it has seen
        self.features = TowerFeatures(self.model, setup.processor, cache, "tower" in recipe.stage.learn)
        mixed, always = recipe.precision == "bf16", self.world.size > 1
        self.objective = Objective(self.model, self.features, mixed, always)
        self._costs = (
            flops_per_token(self.model, setup.part_of),
            flops_per_prediction(self.model, setup.part_of),
            flops_per_tile(self.model),
        )
        self.runner = self._spread()
        self.learned = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(recipe, self.learned, setup.part_of, self.device)
        self.step = self.tokens = 0
        self.data = contents(recipe)
        self.decided = json.loads(recipe.model_dump_json(exclude=MUTABLE_FIELDS))
        self.decided |= {"steps": self.batches.steps, **self.data}

    def _spread(self) -> nn.Module:
        """The objective as this world runs it, its blocks compiled and checkpointed as the recipe says."""
        recipe, world, tower = self.recipe, self.world, self.model.tower
        blocks: list[Any] = [*self.model.decoder.blocks]
        if recipe.compile:
            for block in blocks:
                # what an `Attend` does differs from pack to pack; these are the same for every pack
                for part in (block.attention_norm, block.mlp_norm, block.mlp):
                    part.compile(dynamic=True)
        if self.features.learns:
            blocks += getattr(tower, "blocks", ())
        checkpoint_blocks(blocks, recipe.checkpointing)
        world.choose(recipe, self.model, self.device)
        whole = [] if self.features.learns else [tower]
        if world.kind == "fsdp" and torch.cuda.is_available() and recipe.device != "cpu":
            self.device = torch.device("cuda", world.local)
            tower.to(self.device)
        runner = world.wrap(self.objective, blocks, whole)
        if world.size > 1:
            torch.manual_seed(recipe.seed + world.rank)  # dropout is each process's own
        return runner

    def run(self) -> Path:
        """Train to the last step; a checkpoint is left behind when a signal or Ctrl-C asks to stop."""
        folder = self.recipe.output / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the output folder {self.recipe.output} cannot be made: {error.strerror}; name another"
            ) from error
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(self.features))
            if self.world.main:
                stack.enter_context(hold(self.recipe.output, "output folder"))
            found = checkpoints.latest(folder, self.decided, self.learned, self.device, self.world)
            if found is not None:
                self._restore(found)
                if self.step == self.batches.steps and (self.recipe.output / "model").is_dir():
                    print(f"already finished: step {self.step} of {self.step}", file=sys.stderr)
                    return self.recipe.output / "model"
            elif self.world.main:
                preflight(self.setup, self.batches)
            state = self.world.full_state(self.model)
            if self.world.main:
                self.setup.save_and_compare(state)
            del state
            return self._run(folder)

    def _run(self, folder: Path) -> Path:
        last = self.batches.steps
        report = self._report()
        with report, _stop_requested() as stop:
            if self.step == 0:
                self._measure(report)
            steps = prefetch(self._prepare, self.step, last, self.recipe.workers)
            with contextlib.closing(steps):
                for ready in steps:
                    started = time.perf_counter()
                    values = self._step(ready)
                    self.step += 1
                    self.tokens += ready.tokens
                    report.step(self.step, values, ready.tokens, time.perf_counter() - started, ready.flops)
                    if self.step % self.recipe.measure_every == 0 or self.step == last:
                        self._measure(report)
                    # every process stops after the same step, whichever was asked to
                    leave = bool(stop) if self.world.size == 1 else self.world.sum(len(stop))[0] > 0
                    if leave or self.step % self.recipe.save_every == 0 or self.step == last:
                        self._save(folder)
                    if leave and self.step < last:
                        report.say(f"saved at step {self.step} of {last}; the same command goes on")
                        raise KeyboardInterrupt
        model = self.recipe.output / "model"
        state = self.world.full_state(self.model)
        if self.world.main:
            self.setup.save(model, self._summary(report), state)
            report.picture()
        self.world.barrier()
        return model

    def _report(self) -> TrainingReport:
        recipe = self.recipe
        if not self.world.main:
            return TrainingReport(recipe, [], self.step, self.batches.steps, None, speaks=False)
        kind = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        lines = self.setup.describe(self.batches.steps)
        if self.world.size > 1:
            spread = {"ddp": "a copy of the model each (DDP)", "fsdp": "the model in shards (FSDP)"}
            lines.append(f"  {self.world.size} processes, {spread[self.world.kind]}")
        most = peak(self.device, kind) * self.world.size
        return TrainingReport(recipe, lines, self.step, self.batches.steps, most)

    def _prepare(self, step: int) -> Ready:
        """A step's rows and pictures; called in threads, ahead of time."""
        batch = self.batches[step]
        works = self._share(batch)
        costs = (
            batch.tokens,
            sum(len(pack.targets) for pack, _ in batch.packs),
            sum(layout.tiles for pack, _ in batch.packs for layout in pack.layouts),
        )
        flops = sum(count * cost for count, cost in zip(costs, self._costs, strict=True))
        return Ready(works, len(batch.packs), batch.tokens, flops)

    def _share(self, batch: Batch) -> list[PackTensors]:
        """This process's packs; as many on every process."""
        rank, size = self.world.rank, self.world.size
        works = [self._work(pack, mirrored) for pack, mirrored in batch.packs[rank::size]]
        missing = -(-len(batch.packs) // size) - len(works)
        return works + [PackTensors.dummy()] * missing

    def _work(self, pack: Pack, mirrored: list[bool]) -> PackTensors:
        """A pack with its pictures; trees whose pictures cannot be read are left out and counted."""
        pin = self.device.type == "cuda"
        trees: list[Tree] = []
        pictures: list[ImageInput] = []
        for tree, mirror in zip(pack.trees, mirrored, strict=True):
            try:
                pictures += self.features.fetch(tree.images, tree.layouts, mirror, pin)
                trees.append(tree)
            except InputError as error:
                self.batches.skipped.add(", ".join(image.name for image in tree.images), error)
        if not trees:
            return PackTensors.dummy()
        return PackTensors.of(pack if len(trees) == len(pack.trees) else Pack(tuple(trees)), pictures, pin)

    def _step(self, ready: Ready) -> dict[str, Any]:
        rate = schedule(self.step, self.batches.steps, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.model.train()
        world = self.world
        [supervised] = world.sum(sum(work.supervised for work in ready.works))
        losses = []
        for number, work in enumerate(ready.works, 1):
            share = 1 / max(supervised, 1)
            if self.recipe.loss_average == "micro_batch":
                share = 1 / (max(work.supervised, 1) * ready.packs)
            with world.accumulate(last=number == len(ready.works)):
                loss = self.runner(work) * share
                if loss.requires_grad:  # a pack without pictures teaches a connector nothing
                    (loss * world.size if world.size > 1 else loss).backward()  # gradients are averaged
            losses.append(loss.detach())
        [total] = world.sum(sum(loss.item() for loss in losses))
        norms = gradient_norms(self.optimizer, world)
        norm = math.sqrt(sum(part**2 for part in norms.values()))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise WorkError(
                f"step {self.step + 1}: the loss is {total}, its gradient's norm {norm}; "
                "go on with a lower learning rate in another output folder"
            )
        clip(self.optimizer, norm, self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        parts = {f"gradient_norm/{part}": value for part, value in norms.items()} if len(norms) > 1 else {}
        return {"loss": total, "gradient_norm": norm, **parts, "rate": rate, "supervised": supervised}

    @torch.no_grad()
    def _measure(self, report: TrainingReport) -> None:
        if not self.recipe.held_out:
            return
        self.model.eval()
        works = self._share(self.batches.held_out)
        mine = (sum(self.runner(work).item() for work in works), sum(work.supervised for work in works))
        loss, supervised = self.world.sum(*mine)
        report.held_out(self.step, loss / max(supervised, 1))
        for sample, question, reference in self.batches.questions(self.recipe.sample_answers):
            if self.world.main or self.world.kind == "fsdp":
                report.answer(self.step, question, reference, self._answer(sample))

    def _answer(self, sample: Sample) -> str:
        """A greedy answer of the model as it stands."""
        pictures = self.features.fetch(sample.images, sample.layouts, mirror=False)
        if self.world.kind == "fsdp":
            tokens = self._slowly(sample, pictures)
        else:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.objective.mixed):
                features = self.features.look(pictures) if pictures else None
                image_tokens = None if features is None else self.model.connect(features, sample.layouts)
                ids = torch.from_numpy(sample.input_ids).to(self.device)
                prompt = Prompt(ids, image_tokens, SamplingParams(max_new_tokens=ANSWER_TOKENS))
                tokens = [token for _, token in generate(self.model, [prompt]) if token is not None]
        text = self.setup.processor.tokenizer.decode(tokens)
        return text.partition(self.setup.processor.template.stop)[0]

    def _slowly(self, sample: Sample, pictures: list[ImageInput]) -> list[int]:
        """The same without a cache, all processes in step, as sharded weights have to be gathered."""
        ids, tokens = torch.from_numpy(sample.input_ids), list[int]()
        while len(tokens) < ANSWER_TOKENS:
            work = PackTensors(
                ids, torch.arange(len(ids)), [Run(len(ids))], ids[:0], ids[:0], torch.zeros(0),
                pictures, sample.layouts,
            )  # fmt: skip
            token = self.world.agree(int(self.runner(work, last=True).argmax()))
            if token in self.model.config.stop_token_ids:
                break
            tokens.append(token)
            ids = torch.cat((ids, torch.tensor([token])))
        return tokens

    def _save(self, folder: Path) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        moments, plain = checkpoints.optimizer_state(self.optimizer, self.learned)
        point = checkpoints.Checkpoint(
            step=self.step,
            weights={name: p.detach().contiguous() for name, p in self.learned.items()},
            moments=moments,
            plain=plain,
            rng=rng,
            recipe=self.decided,
            # A copy: the thread that prepares the next batch may add to it while it is written.
            progress={"tokens": self.tokens, "skipped": dict(self.batches.skipped.reasons)},
        )
        checkpoints.save(folder, point, self.recipe.keep_last, self.world)

    def _restore(self, found: checkpoints.Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(found.weights[name])
        checkpoints.restore_optimizer(self.optimizer, self.learned, found)
        if "cpu" in found.rng:
            torch.set_rng_state(found.rng["cpu"])
        if "cuda" in found.rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(found.rng["cuda"], self.device)
        self.step, self.tokens = found.step, found.progress["tokens"]
        self.batches.skipped.reasons.update(found.progress["skipped"])

    def _summary(self, report: TrainingReport) -> dict[str, Any]:
        return {
            "recipe": json.loads(self.recipe.model_dump_json()),
            "steps": self.step,
            "tokens": self.tokens,
            "skipped_rows": len(self.batches.skipped.reasons),
            "processes": self.world.size,
            "digests": self.data,
            "versions": versions(),
            "answers": report.answers(),
        }


@contextlib.contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM arrives, so that the step under way can end."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt  # asked twice: leave now, the last checkpoint stands
        received.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may handle signals; elsewhere the caller stops us
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
