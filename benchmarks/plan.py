"""Compare the predicted memory and speed of training runs with the measured ones.

    python benchmarks/plan.py [--only NAME ...]

Each configuration trains a few steps in a process of its own, whose largest resident set the system tells
(ru_maxrss); `pumice plan` says beforehand what it will be. One table. Models are random; rows and pictures
are made here. Needs Linux or macOS and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.formats.pumice import folder
from pumice.model.llava import Llava
from pumice.train.plan.estimate import FRAMEWORK, plan
from pumice.train.recipe import load_recipe
from pumice.train.report import read_metrics

SMALL = DecoderConfig(258, 192, 6, 6, 2, 32, 512, context=2048, tied_head=True)
SMOL = DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, context=8192, tied_head=True)  # SmolLM2-135M
LITE = VisionConfig(image_size=256, variant="lite2")
CLIP_B = VisionConfig(
    "clip", 224, 768, 32, depth=12, heads=12, mlp_width=3072, layer=-2, select="patch"
)  # CLIP-ViT-B/32: 49 tokens
LORA = {"learn": {"connector": 1e-4, "lora": 1e-4}, "lora": {"rank": 16}}
FULL = {"learn": {"connector": 1e-4, "decoder": 1e-4}}

# to which the plan's constants were fitted; no other one was looked at before they stood
FITTED = {"135M, LoRA", "135M, whole LLM", "135M, whole LLM, full checkpointing", "small, whole LLM"}
# name -> decoder, tower, what the recipe says
CONFIGURATIONS: dict[str, tuple[DecoderConfig, VisionConfig, dict[str, Any]]] = {
    "small, whole LLM": (SMALL, LITE, {"stage": FULL, "pack_tokens": 2048}),
    "135M, connector": (SMOL, CLIP_B, {"stage": {"learn": {"connector": 1e-3}}, "pack_tokens": 512}),
    "135M, LoRA": (SMOL, CLIP_B, {"stage": LORA, "pack_tokens": 512}),
    "135M, LoRA on int8": (SMOL, CLIP_B, {"stage": LORA | {"base": "int8"}, "pack_tokens": 512}),
    "135M, whole LLM": (SMOL, CLIP_B, {"stage": FULL, "pack_tokens": 512}),
    "135M, whole LLM, full checkpointing": (
        SMOL, CLIP_B, {"stage": FULL, "pack_tokens": 768, "checkpointing": "full"}
    ),
    "135M, whole LLM and tower": (
        SMOL, CLIP_B, {"stage": {"learn": FULL["learn"] | {"tower": 1e-5}}, "pack_tokens": 256}
    ),
    "135M, LoRA, selective checkpointing": (
        SMOL, CLIP_B, {"stage": LORA, "pack_tokens": 1024, "checkpointing": "selective"}
    ),
    "small, connector": (SMALL, LITE, {"stage": {"learn": {"connector": 1e-3}}, "pack_tokens": 4096}),
}  # fmt: skip


def make_model(path: Path, decoder: DecoderConfig, vision: VisionConfig) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    end = tokenizer.token_to_id("<|im_end|>")
    config = ModelConfig(
        decoder, vision, ConnectorConfig("mlp2x_gelu"), ImagePolicy("squash"), stop_token_ids=(end,)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        model = Llava(config)
        model.decoder.embed.weight.mul_(0.02)
    folder.save(path, config, model.state_dict(), tokenizer=tokenizer.to_str())


def make_rows(path: Path, count: int) -> None:
    """Rows with a picture each and answers of LLaVA-Instruct's spread: some words to some hundred."""
    path.mkdir()
    chance = random.Random(0)
    lines = []
    for number in range(count):
        Image.new("RGB", (320, 240), (number % 256, 80, 160)).save(path / f"{number}.jpg")
        answer = "word " * min(90, int(chance.lognormvariate(2.5, 0.8)) + 1)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer.strip()}]
        lines.append(json.dumps({"id": str(number), "image": f"{number}.jpg", "conversations": turns}))
    (path / "rows.jsonl").write_text("\n".join(lines) + "\n")


def train(recipe: Path) -> float:
    """Run the recipe in a process of its own; its largest resident set in bytes."""
    command = [
        sys.executable,
        "-c",
        "import sys; from pumice.train import run; run(sys.argv[1])",
        str(recipe),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(errors.decode())
    return usage.ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def compare(name: str, scratch: Path) -> dict[str, Any]:
    decoder, vision, changes = CONFIGURATIONS[name]
    make_model(scratch / "model", decoder, vision)
    make_rows(scratch / "rows", 64)
    values = {
        "name": name, "output": str(scratch / "run"), "model": str(scratch / "model"),
        "data": [{"rows": str(scratch / "rows" / "rows.jsonl")}], "pictures": [str(scratch / "rows")],
        "batch": 8, "max_steps": 2, "precision": "fp32", "device": "cpu", "warmup": 0.0,
    } | changes  # fmt: skip
    path = scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    predicted = plan(load_recipe(path), path)
    measured = train(path)
    steps = [event for event in read_metrics(scratch / "run" / "metrics.jsonl") if "loss" in event]
    speed = sum(e["tokens"] for e in steps[1:]) / sum(e["seconds"] for e in steps[1:])
    return {
        "name": name, "predicted": predicted.total, "measured": measured, "memory": predicted.memory,
        "predicted_speed": predicted.tokens_per_second, "speed": speed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=CONFIGURATIONS)
    only = parser.parse_args().only
    print(
        "| configuration | fitted | predicted GB | measured GB | difference | beyond PyTorch's own | "
        "tokens/s: both |"
    )
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for name in only or CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as scratch:
            comparison = compare(name, Path(scratch))
        off = comparison["predicted"] / comparison["measured"] - 1
        base = FRAMEWORK["cpu"]
        beyond = (comparison["predicted"] - base) / (comparison["measured"] - base) - 1
        worst = max(worst, 0.0 if name in FITTED else abs(off))
        print(
            f"| {name} | {'yes' if name in FITTED else 'no'} | {comparison['predicted'] / 1e9:.2f} | "
            f"{comparison['measured'] / 1e9:.2f} | {off:+.0%} | {beyond:+.0%} | "
            f"{comparison['predicted_speed']:.0f}, {comparison['speed']:.0f} |",
            flush=True,
        )
        print(
            {kind: round(amount / 1e9, 2) for kind, amount in comparison["memory"].items()}, file=sys.stderr
        )
    print(f"\nworst difference of those that were not fitted {worst:.0%}")


if __name__ == "__main__":
    main()
