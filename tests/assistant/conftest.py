"""Assistants with the tiny model, and pictures to show them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pumice.assistant import Assistant, load
from pumice.config import ImagePolicy
from pumice.formats.load import open_model
from pumice.formats.pumice.folder import save

sys.path.insert(0, str(Path(__file__).parent))  # for `questions`, which test files import


@pytest.fixture(scope="session")
def exact(tiny_folder: Path) -> Assistant:
    return load(tiny_folder, device="cpu", quantize=None)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for i in range(3):
        path = folder / f"picture {i}.png"
        Image.fromarray(random.integers(0, 256, (40 + i, 64, 3), np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def tiled(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """The tiny model with the image policy of LLaVA-NeXT."""
    opened = open_model(tiny_folder)
    policy = ImagePolicy("anyres", pinpoints=((64, 128), (128, 64), (128, 128)))
    config = dataclasses.replace(opened.model.config, image=policy)
    state = opened.model.state_dict() | {"image_newline": torch.ones(config.decoder.width)}
    path = tmp_path_factory.mktemp("tiled") / "model"
    save(path, config, state, tokenizer=opened.processor.tokenizer.backend.to_str())
    return load(path, device="cpu", quantize=None)
