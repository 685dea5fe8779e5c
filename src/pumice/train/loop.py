"""The one training loop: any stage, on one process, resumed by running it again.

Knows the model, the batches and the optimiser. A step: for each pack, image tokens from features,
one forward pass, the summed loss of the supervised tokens divided by their number in the whole
batch; then clip and step. Every random draw depends on the recipe's seed and the step alone, or on
generators whose state is saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pumice.data.packing import Pack
from pumice.engine.generate import Prompt, generate
from pumice.engine.sampling import SamplingParams
from pumice.errors import InputError, WorkError
from pumice.files import hold
from pumice.model.packed import Packed
from pumice.processor import Sample
from pumice.train import checkpoint as checkpoints
from pumice.train.batches import Batch, Batches, prefetch
from pumice.train.features import TowerFeatures
from pumice.train.loss import supervised_loss
from pumice.train.recipe import Recipe
from pumice.train.report import Report
from pumice.train.setup import Setup, prepare
from pumice.weights.parts import WHEELS, locate, weight_files
from pumice.weights.read import find_model

ANSWER_TOKENS = 40  # of a sample answer while training

# fields of a recipe that may change between a run and its continuation without changing its result
FREE = {
    "name", "output", "pictures", "device", "feature_cache", "max_bad_rows", "held_out",
    "save_every", "keep_last", "measure_every", "measure_rows", "sample_answers",
}  # fmt: skip


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end and return the folder of the finished model."""
    torch.manual_seed(recipe.seed)
    setup = prepare(recipe)
    return Trainer(recipe, setup).run()


class Trainer:
    def __init__(self, recipe: Recipe, setup: Setup) -> None:
        self.recipe, self.setup = recipe, setup
        self.model, self.device = setup.model, setup.device
        self.batches = Batches(recipe, setup.processor)
        self.learned = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        groups = [
            {
                "params": [p for n, p in self.learned.items() if setup.part_of(n) == part],
                "lr": rate,
                "peak": rate,
            }
            for part, rate in recipe.stage.learn.items()
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=self.device.type != "mps"
        )
        learns = "tower" in recipe.stage.learn
        self.features = TowerFeatures(self.model, setup.processor, recipe.feature_cache, learns)
        self.step = 0
        self.tokens = 0
        self.decided = json.loads(recipe.model_dump_json(exclude=FREE))
        self.decided["steps"] = self.batches.steps
        self.decided |= contents(recipe)

    def run(self) -> Path:
        """Train to the last step; a checkpoint is left behind when a signal or Ctrl-C asks to stop."""
        folder = self.recipe.output / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the output folder {self.recipe.output} cannot be made: {error.strerror}; name another"
            ) from error
        with hold(self.recipe.output, "output folder"), contextlib.closing(self.features):
            found = checkpoints.latest(folder, self.decided, self.learned, self.device)
            if found is None:
                self.batches.check()
            else:
                self._restore(found)
                if self.step == self.batches.steps and (self.recipe.output / "model").is_dir():
                    print(f"already finished: step {self.step} of {self.step}", file=sys.stderr)
                    return self.recipe.output / "model"
            self.setup.save_and_compare()
            return self._run(folder)

    def _run(self, folder: Path) -> Path:
        report = Report(self.recipe, self.setup.describe(self.batches.steps), self.step, self.batches.steps)
        with report, _stop_requested() as stop:
            if self.step == 0:
                self._measure(report)
            steps = prefetch(self.batches, self.step)
            for batch in steps:
                started = time.perf_counter()
                values = self._step(batch)
                self.step += 1
                self.tokens += batch.tokens
                report.step(self.step, values, batch.tokens, time.perf_counter() - started)
                if self.step % self.recipe.measure_every == 0 or self.step == self.batches.steps:
                    self._measure(report)
                if stop or self.step % self.recipe.save_every == 0 or self.step == self.batches.steps:
                    self._save(folder)
                if stop and self.step < self.batches.steps:
                    steps.close()
                    report.say(f"saved at step {self.step} of {self.batches.steps}; the same command goes on")
                    raise KeyboardInterrupt
        model = self.setup.save(self.recipe.output / "model", self._summary())
        report.picture()
        return model

    def _step(self, batch: Batch) -> dict[str, float]:
        rate = schedule(self.step, self.batches.steps, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.model.train()
        total = 0.0
        for packed, mirrored in batch.packs:
            loss = self._loss(packed, mirrored) / batch.supervised
            if loss.requires_grad:  # a pack without pictures teaches a connector nothing
                loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.learned.values(), self.recipe.clip)
        if not (math.isfinite(total) and norm.isfinite()):
            raise WorkError(
                f"step {self.step + 1}: the loss is {total}, its gradient's norm {norm.item()}; "
                "go on with a lower learning rate in another output folder"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "gradient_norm": norm.item(), "rate": rate, "supervised": batch.supervised}

    def _loss(self, packed: Pack, mirrored: list[bool]) -> Tensor:
        """Summed loss of one pack, fp32 scalar."""

        def here(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(self.device)

        mixed = self.recipe.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            features = [
                self.features(t.images, m) for t, m in zip(packed.trees, mirrored, strict=True) if t.images
            ]
            image_tokens = self.model.connect(torch.cat(features), packed.layouts) if features else None
            hidden = self.model(
                here(packed.input_ids)[None],
                image_tokens,
                positions=here(packed.positions)[None],
                attend=Packed(packed.runs, self.model.config.decoder.sliding_window, self.device),
            )
            return supervised_loss(
                hidden[0],
                self.model.decoder.head_weight,
                here(packed.sources),
                here(packed.targets),
                here(packed.weights),
            )

    @torch.no_grad()
    def _measure(self, report: Report) -> None:
        if not self.recipe.held_out:
            return
        self.model.eval()
        batch = self.batches.held_out
        loss = sum(self._loss(p, m).item() for p, m in batch.packs) / batch.supervised
        report.held_out(self.step, loss)
        for sample, question, reference in self.batches.questions(self.recipe.sample_answers):
            report.answer(self.step, question, reference, self._answer(sample))

    def _answer(self, sample: Sample) -> str:
        """A greedy answer of the model as it stands."""
        mixed = self.recipe.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            features = self.features(sample.images, mirror=False) if sample.images else None
            image_tokens = None if features is None else self.model.connect(features, sample.layouts)
            ids = torch.from_numpy(sample.input_ids).to(self.device)
            prompt = Prompt(ids, image_tokens, SamplingParams(max_new_tokens=ANSWER_TOKENS))
            tokens = [token for _, token in generate(self.model, [prompt]) if token is not None]
        text = self.setup.processor.tokenizer.decode(tokens)
        return text.partition(self.setup.processor.template.stop)[0]

    def _save(self, folder: Path) -> None:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        point = checkpoints.Checkpoint(
            step=self.step,
            weights={name: p.detach().contiguous() for name, p in self.learned.items()},
            optimizer=self.optimizer.state_dict(),
            rng=rng,
            recipe=self.decided,
            # A copy: the thread that prepares the next batch may add to it while it is written.
            progress={"tokens": self.tokens, "skipped": dict(self.batches.skipped.reasons)},
        )
        checkpoints.save(folder, point, self.recipe.keep_last)

    def _restore(self, found: checkpoints.Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(found.weights[name])
        self.optimizer.load_state_dict(found.optimizer)
        torch.set_rng_state(found.rng["cpu"])
        if "cuda" in found.rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(found.rng["cuda"], self.device)
        self.step, self.tokens = found.step, found.progress["tokens"]
        self.batches.skipped.reasons.update(found.progress["skipped"])

    def _summary(self) -> dict[str, Any]:
        return {
            "recipe": json.loads(self.recipe.model_dump_json()),
            "steps": self.step,
            "tokens": self.tokens,
            "skipped_rows": len(self.batches.skipped.reasons),
        }


def contents(recipe: Recipe) -> dict[str, str]:
    """Digests of the files that decide a run: its rows, and the model that it starts from."""
    paths = [source.rows for source in recipe.data]
    if isinstance(recipe.model, Path):
        paths += weight_files(find_model(recipe.model))
    else:
        named = (recipe.model.tower, recipe.model.decoder)
        paths += [file for name in named if name not in WHEELS for file in weight_files(locate(name))]
    digests = {}
    for path in paths:
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests[f"contents of {path}"] = digest.hexdigest()
    return digests


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at 0 <= step < steps: linear warm-up, then a cosine to zero."""
    rising = math.ceil(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


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
