"""Checkpoints of a run: everything that the next step depends on, written whole or not at all.

A checkpoint is a folder `step-000123`, written under another name, flushed, and renamed:

    manifest.json      size and SHA-256 of every other file; a checkpoint without one is no checkpoint
    state.json         step, what decides the run, counters, the optimiser's plain values
    tensors/*.safetensors   what learns, `weights.NAME`, and the optimiser's tensors, `exp_avg.NAME` and so on
    rng-00000.safetensors   random state of each process

One process, or copies (DDP), write one file of tensors. Shards (FSDP) are written by every process through
torch.distributed.checkpoint in its safetensors form, and either form is read by any number of processes.
Knows files and tensors, sharded or not. Does not know the model. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pumice.errors import InputError, WorkError
from pumice.files import make_readable, sha256, sync
from pumice.train.parallel import World

_STATE, _MANIFEST, _TENSORS = "state.json", "manifest.json", "tensors"


@dataclass(frozen=True)
class Checkpoint:
    step: int
    weights: dict[str, Tensor]  # what learns
    moments: dict[str, Tensor]  # the optimiser's tensors, "exp_avg.NAME"
    plain: dict[str, Any]  # its plain values, "step.NAME"
    rng: dict[str, Tensor]  # device -> state of this process's generator
    recipe: dict[str, Any]  # what decides the run; must be the same to go on
    progress: dict[str, Any]  # counters: rows skipped, tokens seen


def optimizer_state(
    optimizer: torch.optim.Optimizer, learned: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state by name: its tensors, and its plain values (a single number counts as one)."""
    moments, plain = {}, {}
    for name, parameter in learned.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                moments[f"{key}.{name}"] = value
            else:
                plain[f"{key}.{name}"] = float(value)
    return moments, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, learned: Mapping[str, Tensor], found: Checkpoint
) -> None:
    """Inverse of `optimizer_state`."""
    for name, parameter in learned.items():
        state: dict[str, Any] = {}
        for key, value in found.plain.items():
            if key.partition(".")[2] == name:
                # fused optimisers count their steps on the device
                state[key.partition(".")[0]] = torch.tensor(value, device=parameter.device)
        for key, tensor in found.moments.items():
            if key.partition(".")[2] == name:
                state[key.partition(".")[0]] = tensor
        if state:
            optimizer.state[parameter] = state


def save(folder: Path, checkpoint: Checkpoint, keep_last: int, world: World | None = None) -> None:
    """Write a checkpoint into `folder` and remove all but the newest `keep_last`; every process takes part.

    Raises WorkError when the disk cannot take it; the checkpoints before it stand.
    """
    world = world or World()
    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / _TENSORS).mkdir(parents=True)
        world.barrier()
        written = _write(partial, checkpoint, world)
        manifest = {k: v for part in world.gather(_digests(partial, written)) for k, v in part.items()}
        if world.main:
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in (partial / _MANIFEST, partial / _TENSORS, partial):
                sync(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap what the disk says
        shutil.rmtree(partial, ignore_errors=True)
        raise WorkError(
            f"cannot write the checkpoint {final} ({error}); make room and run the same command again"
        ) from error
    if world.main:
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        sync(folder)
        for old in _all(folder)[:-keep_last]:
            shutil.rmtree(old)
    world.barrier()


def _write(partial: Path, checkpoint: Checkpoint, world: World) -> list[Path]:
    """This process's files."""
    tensors = {f"weights.{name}": tensor for name, tensor in checkpoint.weights.items()} | checkpoint.moments
    rng = partial / f"rng-{world.rank:05d}.safetensors"
    safetensors.torch.save_file(checkpoint.rng, rng)
    written = [rng]
    if world.kind == "fsdp":
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save as save_shards

        save_shards(
            tensors, storage_writer=HuggingFaceStorageWriter(str(partial / _TENSORS), save_distributed=True)
        )
        written += (partial / _TENSORS).glob(f"shard-{world.rank + 1:05d}-*")
    elif world.main:
        path = partial / _TENSORS / "all.safetensors"
        safetensors.torch.save_file(tensors, path)
        written.append(path)
    if world.main:
        state = {
            "step": checkpoint.step,
            "processes": world.size,
            "recipe": checkpoint.recipe,
            "progress": checkpoint.progress,
            "optimizer": checkpoint.plain,
        }
        (partial / _STATE).write_text(json.dumps(state, indent=1))
        written.append(partial / _STATE)
    for path in written:
        make_readable(path)
        sync(path)
    return written


def latest(
    folder: Path,
    recipe: dict[str, Any],
    learned: Mapping[str, Tensor],
    device: torch.device,
    world: World | None = None,
) -> Checkpoint | None:
    """The newest checkpoint of `folder`, or None; every process takes part.

    learned: the tensors that it must hold, sharded as they are to be read. InputError when it belongs to
    another recipe or is damaged. `rng` is empty where another number of processes wrote it.
    """
    world = world or World()
    found = _all(folder)
    if not found:
        return None
    path = found[-1]
    before = f"step {int(found[-2].name[5:])}" if len(found) > 1 else "the beginning"
    remedy = f"remove this folder to go on from {before}"
    try:
        _verify(path, world)
        state = json.loads((path / _STATE).read_text())
        if different := _differences(state["recipe"], recipe):
            raise _Different(*different[0])
        tensors = _read(path / _TENSORS, learned, device, world)
        rng = path / f"rng-{world.rank:05d}.safetensors"
        same = state["processes"] == world.size
        weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        checkpoint = Checkpoint(
            step=state["step"],
            weights=weights,
            moments={k: v for k, v in tensors.items() if not k.startswith("weights.")},
            plain=state["optimizer"],
            rng=safetensors.torch.load_file(rng) if same else {},
            recipe=state["recipe"],
            progress=state["progress"],
        )
    except _Different as error:
        raise InputError(
            f"{path} was made with {error.key}: {error.then!r}, the recipe now says {error.now!r}; go on as "
            "it was, begin again in another output folder, or name its finished model as the next one's "
            "model"
        ) from error
    except FileNotFoundError as error:
        lacking = Path(error.filename or str(error).rpartition(": ")[2]).name
        raise InputError(f"the checkpoint {path} lacks {lacking}; {remedy}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}); {remedy}") from error
    shapes = [{name: tuple(t.shape) for name, t in held.items()} for held in (weights, learned)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise InputError(f"the checkpoint {path} does not fit the model: {wrong[0]} differs; {remedy}")
    return checkpoint


class _Different(Exception):
    def __init__(self, key: str, then: Any, now: Any) -> None:
        self.key, self.then, self.now = key, then, now


def _read(
    folder: Path, learned: Mapping[str, Tensor], device: torch.device, world: World
) -> dict[str, Tensor]:
    """All tensors of a checkpoint; under FSDP this process's part of each."""
    files = sorted(folder.glob("*.safetensors"))
    if world.kind != "fsdp" and [path.name for path in files] == ["all.safetensors"]:
        return safetensors.torch.load_file(files[0], device=str(device))
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    # Every tensor is as large as the parameter whose name it ends with, and is read into a place like it.
    names = set()
    for path in files:
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    places = {}
    for name in sorted(names):
        parameter = learned.get(name.partition(".")[2])
        if parameter is None:
            raise ValueError(f"{name} is of no parameter that learns")
        places[name] = torch.zeros_like(parameter, requires_grad=False)
    reader = HuggingFaceStorageReader(str(folder))
    load(places, storage_reader=reader, no_dist=world.size == 1)
    return places


def _digests(partial: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }


def _verify(path: Path, world: World) -> None:
    """Compare files with the manifest; each process reads its share. ValueError names a file that differs."""
    manifest: dict[str, dict[str, Any]] = json.loads((path / _MANIFEST).read_text())
    for name, expected in sorted(manifest.items()):
        if (size := (path / name).stat().st_size) != expected["size"]:
            raise ValueError(f"{name} has {size} bytes, its manifest says {expected['size']}")
    for name, expected in sorted(manifest.items())[world.rank :: world.size]:
        if sha256(path / name) != expected["sha256"]:
            raise ValueError(f"{name} is not what was written, by its digest")


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
