"""A tiny LLaVA, its rows and its pictures, all made here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pumice.config import ConnectorConfig, DecoderConfig, ImagePolicy, ModelConfig, VisionConfig
from pumice.formats.pumice import folder
from pumice.model.llava import Llava

sys.path.insert(0, str(Path(__file__).parent))  # for `outcomes`, which test files import

COLOURS = {"red": (200, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 200), "yellow": (230, 220, 30)}
OBJECTS = {"left": (0, 0, 32, 64), "right": (32, 0, 64, 64)}


def make_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


@torch.no_grad()
def calibrate(tower: torch.nn.Module) -> None:
    """Give batch norms the statistics of noise: with those of a fresh tower every picture vanishes."""
    norms = [module for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    tower(torch.randn(16, 3, 64, 64))
    for norm in norms:
        norm.eval()


def tiny_config() -> tuple[Tokenizer, ModelConfig]:
    """A model of two layers, byte-level tokens and four image tokens."""
    tokenizer = make_tokenizer()
    config = ModelConfig(
        decoder=DecoderConfig(
            vocab_size=tokenizer.get_vocab_size(), width=48, depth=2, heads=4, kv_heads=2, head_dim=12,
            mlp_width=96, context=256, tied_head=True,
        ),
        vision=VisionConfig(image_size=64, variant="lite0"),
        connector=ConnectorConfig(kind="mlp2x_gelu"),
        image=ImagePolicy(mode="squash", resample="bilinear"),
        template="chatml",
        stop_token_ids=(tokenizer.token_to_id("<|im_end|>"),),
    )  # fmt: skip
    return tokenizer, config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of `tiny_config`."""
    tokenizer, config = tiny_config()
    torch.manual_seed(1)
    model = Llava(config)
    with torch.no_grad():
        model.decoder.embed.weight.mul_(0.1)  # it is the vocabulary projection too: unit rows would shout
    calibrate(model.tower)
    path = tmp_path_factory.mktemp("model") / "tiny"
    folder.save(path, config, model.state_dict(), tokenizer=tokenizer.to_str())
    return path


def write_rows(path: Path) -> None:
    """Write eight rows about four two-coloured pictures into a folder, with the pictures."""
    lines = []
    names = list(COLOURS)
    for number, left in enumerate(names):
        right = names[(number + 1) % len(names)]
        picture = Image.new("RGB", (64, 64))
        for colour, box in zip((left, right), OBJECTS.values(), strict=True):
            picture.paste(COLOURS[colour], box)
        picture.save(path / f"{number}.png")
        for side, colour in zip(OBJECTS, (left, right), strict=True):
            turns = [
                {"from": "human", "value": f"<image>\n{side}?"},
                {"from": "gpt", "value": colour},
            ]
            lines.append({"id": f"{number}-{side}", "image": f"{number}.png", "conversations": turns})
    (path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_rows`."""
    path = tmp_path_factory.mktemp("rows")
    write_rows(path)
    return path


MakeRecipe = Callable[..., Path]


@pytest.fixture
def make_recipe(tiny_model: Path, rows: Path, tmp_path: Path) -> MakeRecipe:
    """Write a recipe for the tiny model, with changes, and return its path."""

    def make(name: str = "run", **changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": name,
            "output": str(tmp_path / name),
            "model": str(tiny_model),
            "stage": {"learn": {"connector": 3e-3, "decoder": 3e-3}},
            "data": [{"rows": str(rows / "rows.jsonl")}],
            "pictures": [str(rows)],
            "epochs": 6,
            "batch": 2,
            "pack_tokens": 96,
            "precision": "fp32",
            "device": "cpu",
            "save_every": 3,
            "measure_every": 1000,
        } | changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make
