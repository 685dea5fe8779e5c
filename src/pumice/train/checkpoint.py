"""Checkpoints of a run: everything that the next step depends on, written whole or not at all.

Knows files and tensors. A checkpoint is a folder `step-000123`; it is written under another name,
flushed, and renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pumice.errors import InputError, WorkError
from pumice.files import make_readable, sync


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
    partial.replace(final)
    sync(folder)
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
        make_readable(path)
        sync(path)
    sync(partial)


def latest(
    folder: Path, recipe: dict[str, Any], learned: Mapping[str, Tensor], device: torch.device
) -> Checkpoint | None:
    """The newest checkpoint of `folder`, or None.

    learned: the tensors that it must hold. InputError when it belongs to another recipe or is damaged.
    """
    found = _all(folder)
    if not found:
        return None
    path = found[-1]
    before = f"step {int(found[-2].name[5:])}" if len(found) > 1 else "the beginning"
    remedy = f"remove this folder to go on from {before}"
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        checkpoint = Checkpoint(
            step=state["step"],
            weights=safetensors.torch.load_file(path / "weights.safetensors", device=str(device)),
            optimizer=tensors["optimizer"],
            rng=tensors["rng"],
            recipe=state["recipe"],
            progress=state["progress"],
        )
    except FileNotFoundError as error:
        raise InputError(f"the checkpoint {path} lacks {Path(error.filename).name}; {remedy}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}); {remedy}") from error
    if different := _differences(checkpoint.recipe, recipe):
        key, then, now = different[0]
        raise InputError(
            f"{path} was made with {key}: {then!r}, the recipe now says {now!r}; go on as it was, begin "
            "again in another output folder, or name the finished model of this one as the next one's model"
        )
    shapes = [{name: tuple(t.shape) for name, t in held.items()} for held in (checkpoint.weights, learned)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise InputError(f"the checkpoint {path} does not fit the model: {wrong[0]} differs; {remedy}")
    return checkpoint


def _differences(then: Any, now: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(key, value then, value now), keys joined by dots down to the values that differ."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [(where, then, now)] if then != now else []
    return [
        found
        for key in sorted(then.keys() | now.keys())
        for found in _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    ]


def _all(folder: Path) -> list[Path]:
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in names if re.fullmatch(r"step-\d{6,}", path.name))
