"""Measure training speed and memory beside transformers' Trainer, on the same weights, rows and batches.

    python benchmarks/train.py                     both sides and stages, then each trick's own share
    python benchmarks/train.py --quick             the same in small, to see that it works
    python benchmarks/train.py --stage connector --side pumice --without TRICK ...       one row
    python benchmarks/train.py --precision bf16    both sides in bfloat16 (autocast)

Model: a tower of CLIP ViT-B/16's size at 224 pixels (196 image tokens), an LLM of SmolLM2-135M's, random
weights, fp32. Rows: the three kinds of LLaVA-Instruct in their published numbers (58 K conversations, 23 K
details, 77 K reasoning about 81 K pictures, so that a picture has 1.95 rows); their lengths are drawn around
those of the published examples: 2 to 5 rounds of some 12 and 25 tokens, and answers of some 130 tokens after
a question of some 15. A word is a token. A step is 8 rows about 4 pictures.

The other side is what a user would write: LlavaForConditionalGeneration from the folder that Pumice exports,
a collator that pads to the longest row and masks all but the answers, the Trainer with the same optimiser,
schedule, clipping and threads. Both read the same picture files with the same preprocessing. Each side runs
in a process of its own; memory is that process's largest resident set, speed is that of all steps but the
first. A trick's share is what the connector stage loses when that trick alone is switched off. Ten minutes on
two cores with nothing beside it. Prints a line a run, or with --json the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROWS, PICTURES = 8, 4  # of a step
TRICKS = {
    "sharing": "rows about one picture share what they begin alike",
    "packing": "no padding token is computed (and nothing shared)",
    "supervised-only": "the last block and the vocabulary projection see supervised positions only",
    "small-packs": "packs of 1,024 tokens one after the other instead of the step at once",
    "no-graph": "frozen parts compute no gradient of their weights",
    "kept-memory": "freed memory stays with the process",
    "runs": "attention in runs of plain causal attention instead of masks",
}
RATES = {"connector": {"connector": 1e-3}, "full": {"connector": 2e-5, "decoder": 2e-5}}


def make_model(folder: Path, size: str) -> None:
    """Write the model, and its export for transformers beside it."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
    from pumice.formats.export import export
    from pumice.formats.pumice.folder import save
    from pumice.formats.read import read_model
    from pumice.model.llava import Llava

    words = [f"w{number}" for number in range(2000)]
    chat = ["user", "assistant", "system", "\n"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", *chat, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    real = size == "real"
    decoder = DecoderConfig(
        vocab_size=49152 if real else 2048, width=576 if real else 64, depth=30 if real else 2,
        heads=9 if real else 4, kv_heads=3 if real else 2, head_dim=64 if real else 16,
        mlp_width=1536 if real else 96, context=2048, rope_theta=100000.0, tied_head=True,
    )  # fmt: skip
    vision = VisionConfig(
        kind="clip", image_size=224 if real else 56, width=768 if real else 32, stride=16 if real else 14,
        depth=12 if real else 3, heads=12 if real else 2, mlp_width=3072 if real else 64,
        activation="quick_gelu", layer=-2,
    )  # fmt: skip
    mean = (0.48145466, 0.4578275, 0.40821073)
    image = ImagePolicy("crop", mean, (0.26862954, 0.26130258, 0.27577711), pad_color=(122, 116, 104))
    config = ModelConfig(
        decoder, vision, ConnectorConfig("mlp2x_gelu"), image, "chatml",
        stop_token_ids=(tokenizer.token_to_id("<|im_end|>"),),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llava(config)
    with torch.no_grad():
        model.decoder.embed.weight.mul_(0.04)  # it is the vocabulary projection too
    save(folder / "ours", config, model.state_dict(), tokenizer=tokenizer.to_str())
    export(read_model(folder / "ours"), "hf", folder / "theirs")


def make_rows(folder: Path, steps: int, scale: float = 1.0) -> None:
    """Rows and pictures of `steps` steps, in order."""
    from PIL import Image

    random = np.random.default_rng(0)

    def words(mean: float, spread: float) -> str:
        count = max(3, int(random.normal(mean, spread) * scale))
        return " ".join(f"w{n}" for n in random.integers(0, 2000, count))

    def row(kind: str) -> list[tuple[str, str]]:
        if kind == "conversation":
            return [(words(12, 3), words(25, 12)) for _ in range(random.integers(2, 6))]
        if kind == "detail":
            return [(words(12, 4), words(130, 35))]
        return [(words(18, 6), words(130, 40))]

    chances = {"conversation": 58 / 81, "detail": 23 / 81, "reasoning": 77 / 81}
    lines, picture = [], 0
    for _ in range(steps):
        while True:  # until the pictures have as many rows as a step takes
            kinds = [[k for k, c in chances.items() if random.random() < c] for _ in range(PICTURES)]
            if sum(map(len, kinds)) == ROWS and all(kinds):
                break
        for rows in kinds:
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(folder / f"{picture}.jpg")
            for kind in rows:
                turns = []
                for number, (question, answer) in enumerate(row(kind)):
                    shown = "<image>\n" if not number else ""
                    turns.append({"from": "human", "value": shown + question})
                    turns.append({"from": "gpt", "value": answer})
                lines.append({"id": str(len(lines)), "image": f"{picture}.jpg", "conversations": turns})
            picture += 1
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ours(folder: Path, stage: str, steps: int, without: list[str], options: list[str]) -> dict[str, Any]:
    """Train with Pumice; the losses and seconds of each step."""
    import torch
    import yaml

    from pumice.data import packing
    from pumice.processor import Sample
    from pumice.tokens import IGNORE
    from pumice.train import batches, loop, objective
    from pumice.train.recipe import load_recipe
    from pumice.train.report import read_metrics
    from pumice.train.setup import prepare

    alone = {"sharing", "packing"} & set(without)
    picture_of: list[str] = [json.loads(line)["image"] for line in (folder / "rows.jsonl").open()]

    def in_order(self: Any, epoch: int) -> list[list[tuple[int, int]]]:
        groups: dict[Any, list[tuple[int, int]]] = {}
        for number, name in enumerate(picture_of):
            groups.setdefault(number if alone else name, []).append((0, number))
        return list(groups.values())

    def padded(samples: Any, budget: int) -> Any:
        longest = LONGEST[int(samples[0].id) // ROWS]
        trees = []
        for sample in samples:
            more = longest - len(sample.input_ids)
            ids = np.concatenate([sample.input_ids, np.zeros(more, np.int64)])
            labels = np.concatenate([sample.labels, np.full(more, IGNORE)])
            trees.append(packing.prefix_tree([Sample(sample.id, ids, labels, sample.images, sample.layouts)]))
        return trees

    class Everywhere(objective.Objective):
        """What a step was with hidden states and logits of all positions."""

        def _hidden(self, work: Any, rows: Any) -> Any:
            self.sources = rows
            return super()._hidden(work, torch.arange(len(work.input_ids)))

        def loss(self, hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
            logits = (hidden @ head.T)[self.sources]
            return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with patch.object(objective, "supervised_loss", self.loss):
                return super().forward(*args, **kwargs)

    class Masked(objective.PackedAttention):
        """What attention was without runs: every tree a matrix."""

        def __init__(self, runs: Any, *rest: Any) -> None:
            super().__init__(runs, *rest)
            order = [torch.arange(run.length + sum(c for _, c in run.before)) for run in runs]
            self.masks = [
                (keys[len(keys) - run.length :, None] >= keys) for run, keys in zip(runs, order, strict=True)
            ]
            self.plain = False

    out = Path(tempfile.mkdtemp(dir=folder))
    values = {
        "name": "speed", "output": str(out), "model": str(folder / "ours"),
        "stage": {"learn": RATES[stage]}, "data": [{"rows": str(folder / "rows.jsonl")}],
        "pictures": [str(folder)], "batch": ROWS if alone else PICTURES, "warmup": 0, "precision": "fp32",
        "device": "cpu", "save_every": 1000, "measure_every": 1000, "max_steps": steps,
        "pack_tokens": 10**6 if "small-packs" in without else 1024,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(folder / "recipe.yaml", options)
    patches = [patch.object(batches.Batches, "_groups", in_order)]
    if "packing" in without:
        setup = prepare(recipe)
        rows = batches.Rows(folder / "rows.jsonl")
        finder = batches.ImageFinder(folder)
        lengths = [len(setup.processor.training_sample(r.conversation(finder)).input_ids) for r in rows]
        LONGEST[:] = [max(lengths[i : i + ROWS]) for i in range(0, len(lengths), ROWS)]
        del setup
        patches.append(patch.object(batches, "fitting_trees", padded))
    if "supervised-only" in without:
        patches.append(patch.object(loop, "Objective", Everywhere))
    if "kept-memory" in without:
        patches.append(patch.object(loop, "keep_freed_memory", lambda: False))
    if "runs" in without:
        patches.append(patch.object(objective, "PackedAttention", Masked))
    for active in patches:
        active.start()
    setup = prepare(recipe)
    trainer = loop.Trainer(recipe, setup)
    if "no-graph" in without:
        setup.model.requires_grad_(True)
    cpu_seconds: list[float] = []
    plain_step = trainer._step

    def step(ready: Any) -> dict[str, Any]:
        started = time.process_time()
        values = plain_step(ready)
        cpu_seconds.append(time.process_time() - started)
        return values

    trainer._step = step
    # a checkpoint and the finished model are not part of a step: neither side writes one
    with patch.object(trainer, "_save"), patch.object(setup, "save"), patch.object(setup, "save_and_compare"):
        trainer.run()
    events = [event for event in read_metrics(out / "metrics.jsonl") if "loss" in event]
    return {"losses": [e["loss"] for e in events], "seconds": [e["seconds"] for e in events],
            "cpu_seconds": cpu_seconds, "tokens": [e["tokens"] for e in events],
            "peak_share": [e["peak_share"] for e in events]}  # fmt: skip


LONGEST: list[int] = []


def theirs(folder: Path, stage: str, steps: int, precision: str, checkpointing: bool) -> dict[str, Any]:
    """Train with transformers."""
    import torch
    from transformers import (
        LlavaForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from pumice.config import IMAGE_TOKEN
    from pumice.data.rows import ImageFinder, Rows
    from pumice.formats.read import read_model
    from pumice.processor import Processor
    from pumice.tokens import IGNORE, Tokenizer

    loaded = read_model(folder / "ours")
    processor = Processor(loaded.config, Tokenizer(loaded.tokenizer))
    del loaded
    set_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "theirs", dtype=torch.float32)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if stage == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    image_token = model.config.image_token_id
    rows, finder = Rows(folder / "rows.jsonl"), ImageFinder(folder)

    class Steps(torch.utils.data.Dataset[list[dict[str, Any]]]):
        def __len__(self) -> int:
            return steps

        def __getitem__(self, step: int) -> list[dict[str, Any]]:
            items = []
            for index in range(step * ROWS, (step + 1) * ROWS):
                sample = processor.training_sample(rows[index].conversation(finder))
                ids = np.where(sample.input_ids == IMAGE_TOKEN, image_token, sample.input_ids)
                items.append(
                    {
                        "ids": ids,
                        "labels": sample.labels,
                        "pixels": processor.pixels(sample.images, sample.layouts),
                    }
                )
            return items

    def collate(batch: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        [items] = batch
        longest = max(len(item["ids"]) for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE)
        visible = torch.zeros_like(ids)
        for number, item in enumerate(items):
            count = len(item["ids"])
            ids[number, :count] = torch.from_numpy(item["ids"])
            labels[number, :count] = torch.from_numpy(item["labels"])
            visible[number, :count] = 1
        pixels = torch.from_numpy(np.concatenate([item["pixels"] for item in items]))
        return {"input_ids": ids, "labels": labels, "attention_mask": visible, "pixel_values": pixels}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu_seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()
            self.cpu_started = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)
            self.cpu_seconds.append(time.process_time() - self.cpu_started)

        def on_log(self, _: Any, state: Any, control: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Steps())

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=1, max_steps=steps, use_cpu=True,
        learning_rate=next(iter(RATES[stage].values())), lr_scheduler_type="cosine", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
        remove_unused_columns=False, disable_tqdm=True, gradient_checkpointing=checkpointing,
        optim="adamw_torch_fused", dataloader_pin_memory=False, bf16=precision == "bf16",
    )  # fmt: skip
    started = time.perf_counter()
    InOrder(
        model=model, args=arguments, train_dataset=Steps(), data_collator=collate, callbacks=[clock]
    ).train()
    return {
        "losses": clock.losses,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "whole": time.perf_counter() - started,
    }


def measure(folder: Path, side: str, stage: str, without: list[str], options: argparse.Namespace) -> Any:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--inside", str(folder), "--side", side, "--stage", stage]
    command += ["--steps", str(options.steps), "--precision", options.precision]
    command += [word for trick in without for word in ("--without", trick)]
    command += [word for option in options.set for word in ("--set", option)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{side} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def inside(arguments: argparse.Namespace) -> None:
    folder, [stage], [side] = Path(arguments.inside), arguments.stage, arguments.side
    if side == "pumice":
        options = [f"precision={arguments.precision}", *arguments.set]
        result = ours(folder, stage, arguments.steps, arguments.without, options)
    else:
        checkpointing = side.endswith("checkpointing")
        result = theirs(folder, stage, arguments.steps, arguments.precision, checkpointing)
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    later = result["seconds"][1:] or result["seconds"]
    result["samples_per_second"] = ROWS * len(later) / sum(later)
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sides = ("pumice", "transformers", "transformers-checkpointing")
    parser.add_argument("--side", action="append", choices=sides, default=None)
    parser.add_argument("--stage", action="append", choices=tuple(RATES), default=None)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--without", action="append", choices=tuple(TRICKS), default=[])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--set", action="append", default=[], help="a key of Pumice's recipe, key=value")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short rows")
    parser.add_argument("--folder", type=Path, help="where model and rows are kept for another run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments)
        return
    everything = not (arguments.side or arguments.stage or arguments.without)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "theirs").exists():
            make_model(folder, "tiny" if arguments.quick else "real")
        make_rows(folder, arguments.steps, 0.2 if arguments.quick else 1.0)
        results: dict[str, Any] = {}

        def row(stage: str, side: str, without: list[str], beside: str) -> None:
            name = " ".join([stage, side, *(f"without {trick}" for trick in without)])
            results[name] = measure(folder, side, stage, without, arguments)
            if not arguments.json:
                _print_result(name, results[name], results.get(f"{stage} {beside}"))

        for stage in arguments.stage or RATES:
            for side in arguments.side or ("transformers", "pumice"):
                row(stage, side, arguments.without if side == "pumice" else [], "transformers")
        for trick in TRICKS if everything else ():
            row("connector", "pumice", [trick], "pumice")
    if arguments.json:
        print(json.dumps(results))


def _print_result(name: str, result: dict[str, Any], other: dict[str, Any] | None) -> None:
    line = f"{name:<44} {result['samples_per_second']:6.3f} rows/s {result['peak_gb']:6.2f} GB"
    later = result["cpu_seconds"][1:] or result["cpu_seconds"]
    line += f" {sum(later) / len(later):6.1f} CPU s a step"
    if other is None or other is result:
        line += "  losses " + " ".join(f"{loss:.5f}" for loss in result["losses"])
    else:
        faster = result["samples_per_second"] / other["samples_per_second"]
        apart = max(abs(a - b) for a, b in zip(result["losses"], other["losses"], strict=True))
        line += f"  {faster:.2f} x the speed, {result['peak_gb'] / other['peak_gb']:.0%} of the memory"
        line += f", losses differ by {apart:.1e} at most"
    print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
