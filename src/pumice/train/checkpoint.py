"""Checkpoints of a run: everything that the next step depends on, written completely or not at all.

A checkpoint is a folder `step-000123`. It is written under another name, flushed to disk, and renamed:

    manifest.json      size and SHA-256 of every other file; a folder without one is not a checkpoint
    state.json         step, the recipe fields that must not change, counters, the optimiser's plain values
    tensors/*.safetensors   trainable weights, `weights.NAME`, and the optimiser's tensors, `exp_avg.NAME` ...
    rng-00000.safetensors   random state of each process

One process, or several with copies (DDP), write one file of tensors. With shards (FSDP) every process writes
its own through torch.distributed.checkpoint, in its safetensors form. Any number of processes can read
either form. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pumice.errors import InputError, WorkError, shorten
from pumice.files import make_readable, sha256, sync
from pumice.train.parallel import World
from pumice.train.provenance import CONTENTS

# The classes of a run, by which a resumed run is compared as by its recipe; a checkpoint leaves these out.
CLASSES = {"trainer": "Trainer", "objective": "Objective"}
_STATE, _MANIFEST, _TENSORS = "state.json", "manifest.json", "tensors"
_STATE_TYPES = {"step": int, "processes": int, "recipe": dict, "progress": dict, "optimizer": dict}


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step."""

    step: int
    weights: dict[str, Tensor]  # trainable parameters by name
    moments: dict[str, Tensor]  # the optimiser's tensors, "exp_avg.NAME"
    plain: dict[str, Any]  # the optimiser's plain values, "step.NAME"
    rng: dict[str, Tensor]  # device -> state of this process's generator, and the number of its threads
    recipe: dict[str, Any]  # the fields that decide the run: a resumed run must have the same
    progress: dict[str, Any]  # counters: rows skipped, tokens computed


def optimizer_state(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimiser's state by name: tensors, and plain values (0-dimensional tensors among them)."""
    moments, plain = {}, {}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                moments[f"{key}.{name}"] = value
            else:
                plain[f"{key}.{name}"] = value if isinstance(value, int) else float(value)
    return moments, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor], checkpoint: Checkpoint
) -> None:
    """Put the state of a checkpoint into an optimiser; inverse of `optimizer_state`."""
    for key, value in (checkpoint.plain | checkpoint.moments).items():
        kind, _, name = key.partition(".")
        if (parameter := trainable.get(name)) is not None:
            # AdamW counts its steps in a tensor on the device, bitsandbytes in a number.
            if isinstance(value, float):
                value = torch.tensor(value, device=parameter.device)
            optimizer.state[parameter][kind] = value


def save(folder: Path, checkpoint: Checkpoint, keep_last: int, world: World | None = None) -> None:
    """Write a checkpoint into `folder` and remove all but the newest `keep_last`. Every process must call it.

    Raises WorkError when it cannot be written; earlier checkpoints stay.
    """
    # 1. Write under a hidden name, so that a crash never leaves half of a checkpoint to be read.
    world = world or World()
    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / _TENSORS).mkdir(parents=True)
        world.barrier()
        entries = world.gather(_write(partial, checkpoint, world))
        manifest = {name: entry for part in entries for name, entry in part.items()}
        # 2. The manifest comes last: it certifies every other file.
        if world.main:
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in (partial / _MANIFEST, partial / _TENSORS, partial):
                sync(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap OSError
        shutil.rmtree(partial, ignore_errors=True)
        raise WorkError(
            f"cannot write the checkpoint {final} ({error}); make room and run the same command again"
        ) from error
    # 3. Rename, then remove old checkpoints: at least one complete checkpoint exists at any time.
    if world.main:
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        sync(folder)
        for old in _list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    world.barrier()


def _write(partial: Path, checkpoint: Checkpoint, world: World) -> dict[str, dict[str, Any]]:
    """Write this process's files, flush them to disk, and return their entries of the manifest."""
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
        safetensors.torch.save_file(_unshared(tensors), path)
        written.append(path)
    if world.main:
        state = {
            "step": checkpoint.step,
            "processes": world.size,
            "recipe": {k: v for k, v in checkpoint.recipe.items() if (k, v) not in CLASSES.items()},
            "progress": checkpoint.progress,
            "optimizer": checkpoint.plain,
        }
        (partial / _STATE).write_text(json.dumps(state, indent=1))
        written.append(partial / _STATE)
    for path in written:
        make_readable(path)
        sync(path)
    return {
        path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in written
    }


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with copies of those that share memory, as all tables of an 8-bit optimiser do."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def latest(
    folder: Path,
    recipe: dict[str, Any],
    trainable: Mapping[str, Tensor],
    device: torch.device,
    world: World | None = None,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Checkpoint | None:
    """Read the newest checkpoint of `folder`; None if there is none. Every process must call it.

    recipe: the fields that must be the same. complete: adds the fields to a stored recipe that the version
    which wrote it did not have. trainable: the tensors to read, sharded as the caller has them.
    Raises InputError when the checkpoint belongs to another recipe or is damaged. `rng` is empty if another
    number of processes wrote it.
    """
    # 1. Find the newest checkpoint, and the one before it, which an error message offers instead.
    world = world or World()
    paths = _list_checkpoints(folder)
    if not paths:
        return None
    path = paths[-1]
    before = f"step {int(paths[-2].name[5:])}" if len(paths) > 1 else "the beginning"
    remedy = f"remove this folder to continue from {before}"
    try:
        # 2. Verify files before the recipe: a damaged state.json could blame the recipe.
        _verify(path, world)
        state = _read_state(path / _STATE)
        for key, stored, current in sorted(_differences(complete(state["recipe"]), recipe), key=_cause_first):
            if key.startswith(CONTENTS):
                raise InputError(
                    f"the {key} have changed since this run began; bring the old ones back to continue, or "
                    "start again in another output folder"
                )
            now = "this run has" if key in CLASSES else "the recipe now says"
            raise InputError(
                f"{path} was made with {key}: {stored!r}, {now} {current!r}; set it back to continue, start "
                "again in another output folder, or start a new run from the finished model"
            )
        # 3. Read tensors and this process's random state.
        tensors = _read(path / _TENSORS, trainable, device, world)
        rng = path / f"rng-{world.rank:05d}.safetensors"
        same_size = state["processes"] == world.size
        weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        checkpoint = Checkpoint(
            step=state["step"],
            weights=weights,
            moments={k: v for k, v in tensors.items() if not k.startswith("weights.")},
            plain=state["optimizer"],
            rng=safetensors.torch.load_file(rng) if same_size else {},
            recipe=state["recipe"],
            progress=state["progress"],
        )
    except InputError:
        raise
    except FileNotFoundError as error:
        missing = Path(error.filename or str(error).rpartition(": ")[2]).name
        raise InputError(f"the checkpoint {path} lacks {missing}; {remedy}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the checkpoint {path} is damaged ({error}); {remedy}") from error
    # 4. Compare names and shapes with the model's.
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (weights, trainable)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise InputError(f"the checkpoint {path} does not fit the model: {wrong[0]} differs; {remedy}")
    return checkpoint


def _read(
    folder: Path, trainable: Mapping[str, Tensor], device: torch.device, world: World
) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint; under FSDP this process's part of each."""
    files = sorted(folder.glob("*.safetensors"))
    if world.kind != "fsdp" and [path.name for path in files] == ["all.safetensors"]:
        return safetensors.torch.load_file(files[0], device=str(device))
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    # torch reads into tensors of the caller's. Each stored tensor has the shape and the sharding of the
    # parameter whose name follows its first dot.
    names = set()
    for path in files:
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    buffers = {}
    for name in sorted(names):
        parameter = trainable.get(name.partition(".")[2])
        if parameter is None:
            raise ValueError(f"{name} belongs to no parameter that learns")
        buffers[name] = torch.zeros_like(parameter, requires_grad=False)
    reader = HuggingFaceStorageReader(str(folder))
    load(buffers, storage_reader=reader, no_dist=world.size == 1)
    return buffers


def _read_state(path: Path) -> dict[str, Any]:
    """Read state.json. Raises ValueError where a value has another type than `save` writes."""
    state = json.loads(path.read_text())
    if not isinstance(state, dict) or any(type(state.get(k)) is not kind for k, kind in _STATE_TYPES.items()):
        raise ValueError(f"{_STATE} lacks {', '.join(_STATE_TYPES)}, or has them in other types")
    if wrong := [key for key, value in state["optimizer"].items() if not isinstance(value, int | float)]:
        raise ValueError(f"{_STATE}: {shorten(wrong[0])} should be a number")
    return state


def _verify(path: Path, world: World) -> None:
    """Compare files with the manifest, each process a share of them. ValueError names a file that differs."""
    manifest = json.loads((path / _MANIFEST).read_text())
    entries = manifest.values() if isinstance(manifest, dict) else [None]
    if not all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in entries):
        raise ValueError(f"{_MANIFEST} does not give the size and the SHA-256 of each file")
    written = {file.relative_to(path).as_posix() for file in path.rglob("*.*") if file.is_file()}
    if uncertified := written - {*manifest, _MANIFEST}:
        raise ValueError(f"{_MANIFEST} does not name {min(uncertified)}")
    for name, expected in sorted(manifest.items()):
        if (size := (path / name).stat().st_size) != expected["size"]:
            raise ValueError(f"{name} has {size} bytes, its manifest says {expected['size']}")
    for name, expected in sorted(manifest.items())[world.rank :: world.size]:
        if sha256(path / name) != expected["sha256"]:
            raise ValueError(f"{name} has changed: its SHA-256 is not the manifest's")


def _differences(stored: Any, current: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, stored value, current value) of every value that differs; nested keys joined by dots."""
    if isinstance(stored, dict) and isinstance(current, dict):
        for name in sorted(stored.keys() | current.keys()):
            yield from _differences(stored.get(name), current.get(name), f"{key}.{name}" if key else name)
    elif stored != current:
        yield key, stored, current


def _cause_first(difference: tuple[str, Any, Any]) -> int:
    """Return a sort key: another path brings other contents, and those bring other numbers of steps."""
    key = difference[0]
    return 2 if key in ("steps", "shuffle_block") else 1 if key.startswith(CONTENTS) else 0


def _list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    names = folder.iterdir() if folder.is_dir() else ()
    checkpoints = [path for path in names if re.fullmatch(r"step-\d{6,}", path.name)]
    # By number: step-1000000 follows step-999999.
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix("step-")))
