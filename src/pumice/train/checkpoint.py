"""Checkpoints of a run: everything that the next step depends on, written whole or not at all.

Knows files and tensors. A checkpoint is a folder `step-000123`; it is written under another name,
flushed, and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pumice.errors import InputError, WorkError


@dataclass(frozen=True)
class Checkpoint:
    step: int
    weights: dict[str, Tensor]  # what learns
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]  # device -> state of its generator
    recipe: dict[str, Any]  # what decides the run; must be the same to go on
    progress: dict[str, Any]  # counters: rows skipped, tokens seen


def save(folder: Path, checkpoint: Checkpoint, keep_last: int) -> None:
    """Write a checkpoint into `folder` and remove all but the newest `keep_last`.

    Raises WorkError when the disk cannot take it; the checkpoints before it stand.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        _write(partial, checkpoint)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap what the disk says
        shutil.rmtree(partial, ignore_errors=True)
        raise WorkError(
            f"cannot write the checkpoint {final} ({error}); make room and run the same command again"
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in _all(folder)[:-keep_last]:
        shutil.rmtree(old)


def _write(partial: Path, checkpoint: Checkpoint) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    safetensors.torch.save_file(checkpoint.weights, partial / "weights.safetensors")
    torch.save({"optimizer": checkpoint.optimizer, "rng": checkpoint.rng}, partial / "state.pt")
    state = {"step": checkpoint.step, "recipe": checkpoint.recipe, "progress": checkpoint.progress}
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for path in partial.iterdir():
        with path.open("r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())


def latest(folder: Path, recipe: dict[str, Any], device: torch.device) -> Checkpoint | None:
    """The newest checkpoint of `folder`, or None. InputError when it belongs to another recipe."""
    found = _all(folder)
    if not found:
        return None
    path = found[-1]
    state = json.loads((path / "state.json").read_text())
    different = sorted(
        k for k in recipe.keys() | state["recipe"].keys() if recipe.get(k) != state["recipe"].get(k)
    )
    if different:
        key = different[0]
        before, now = state["recipe"].get(key), recipe.get(key)
        raise InputError(
            f"{path} was made with {key}: {before!r}, the recipe now says {now!r}; "
            "choose another output folder, or remove this one to begin again"
        )
    tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(
        step=state["step"],
        weights=safetensors.torch.load_file(path / "weights.safetensors", device=str(device)),
        optimizer=tensors["optimizer"],
        rng=tensors["rng"],
        recipe=state["recipe"],
        progress=state["progress"],
    )


def _all(folder: Path) -> list[Path]:
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in names if re.fullmatch(r"step-\d{6,}", path.name))
