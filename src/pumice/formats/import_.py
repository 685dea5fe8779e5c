"""Convert any model that can be read into a Pumice folder, after everything has been checked."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from pumice import __version__
from pumice.errors import InputError, check_known, counted
from pumice.formats.load import new_parts, shapes
from pumice.formats.pumice.folder import CONFIG, check, save
from pumice.formats.pumice.quantized import as_bytes, rounded
from pumice.formats.quantize import kept_below, quantize_state
from pumice.formats.read import find_model, read_model
from pumice.formats.recognise import FormatKind, recognise
from pumice.processor import Processor
from pumice.storage.download import origin
from pumice.storage.json_file import read_json
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import FLOATS, LazyStateDict
from pumice.tokens import Tokenizer

# The types that a user can choose for the stored tensors. "keep" leaves each as it is.
DTYPES = {"keep": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Imported:
    """The kind of source that was read, and the model that was written."""

    kind: FormatKind
    model: LoadedParts

    def summary(self) -> dict[str, Any]:
        """Return what `pumice import` prints, and what its `--json` writes."""
        config, state = self.model.config, self.model.state
        decoder, vision, image = config.decoder, config.vision, config.image
        sees = vision.kind != "none"
        return {
            "source": self.kind.value,
            "parameters": sum(tensor.size // tensor.dtype.itemsize for tensor in state.values()),
            "bytes": sum(tensor.size for tensor in (state | as_bytes(state)).values()),
            "types": sorted({t.blocks.kind.name if t.blocks else FLOATS[t.dtype] for t in state.values()}),
            "decoder": f"{counted(decoder.depth, 'block')} of width {decoder.width}, {decoder.vocab_size} "
            f"tokens, context {decoder.context}",
            "tower": f"{vision.kind}, {vision.image_size} pixels, layer {vision.layer}" if sees else None,
            "connector": config.connector.kind if sees else None,
            "pictures": f"{image.mode}, {config.image_tokens} tokens a square" if sees else None,
            "template": config.template,
            "lora": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}" if config.lora else None,
            "notes": list(self.model.notes),
        }


def import_model(
    source: str,
    target: str | os.PathLike[str],
    *,
    dtype: str = "keep",
    template: str | None = None,
    tower: str | None = None,
    base: str | None = None,
    mmproj: str | None = None,
    quantize: str | None = None,
) -> Imported:
    """Write `source` as the folder `target`, one tensor at a time.

    dtype: of DTYPES. template, tower, base, mmproj: as for `read_model`; a tower given to a bare
    language model is joined to it by a new, untrained connector. quantize: "int8" or "int4" stores the
    decoder's matrices in few bits, with adapters merged, so that opening the folder on a CPU costs
    nothing. Raises InputError, and WorkError if the disk is full; nothing is left behind then.
    """
    # 1. Look at the target first: reading may download gigabytes.
    check_known(dtype, DTYPES, f"there is no type {dtype!r}")
    path, target = find_model(source), Path(target)
    _check_target(path, target)
    # 2. Read the parts. The tensors stay in their files.
    kind = recognise(path)
    if tower is not None and kind in (FormatKind.LLM, FormatKind.GGUF):
        loaded = new_parts(tower, source, template=template)
        loaded = dataclasses.replace(loaded, notes=(*loaded.notes, "the connector is fresh: train it first"))
    else:
        loaded = read_model(source, template=template, tower=tower, base=base, mmproj=mmproj)
    # 3. Check that tokenizer, config and tensors fit each other, by building what a loaded model needs.
    Processor(loaded.config, Tokenizer(loaded.tokenizer))
    expected = shapes(loaded.config)
    check(loaded.state, expected, str(path))
    # 4. Write in the model's order, so that equal models give equal files.
    state = {name: loaded.state[name] for name in expected if name in loaded.state}
    if quantize is not None:
        loaded, state = _quantize(loaded, state, quantize)
    elif kind is not FormatKind.OWN:
        loaded = dataclasses.replace(loaded, notes=(*loaded.notes, *_widened(state, dtype)))
        state = {name: dataclasses.replace(tensor, blocks=None) for name, tensor in state.items()}
    if (stored_dtype := DTYPES[dtype]) is not None:
        floats = {name: tensor.cast(stored_dtype) for name, tensor in state.items() if tensor.blocks is None}
        state |= floats
    loaded = dataclasses.replace(loaded, state=state)
    save(
        target,
        loaded.config,
        state,
        tokenizer=loaded.tokenizer.to_str(),
        provenance=loaded.provenance | _origin(kind, loaded),
        parts=loaded.parts,
        sentencepiece=loaded.sentencepiece,
    )
    return Imported(kind, loaded)


def _quantize(loaded: LoadedParts, state: LazyStateDict, bits: str) -> tuple[LoadedParts, LazyStateDict]:
    """Quantise the decoder, with adapters merged. It is then no longer the decoder of a wheel."""
    state = quantize_state(loaded.config, state, bits)
    parts = {part: source for part, source in loaded.parts.items() if part != "decoder"}
    config = dataclasses.replace(loaded.config, lora=None)
    notes = (*loaded.notes, *filter(None, [rounded(state), kept_below(config, state, bits)]))
    return dataclasses.replace(loaded, config=config, parts=parts, notes=notes), state


def _widened(state: LazyStateDict, dtype: str) -> list[str]:
    """Say which matrices in few bits are stored as floats."""
    in_blocks = [tensor for tensor in state.values() if tensor.blocks is not None]
    if not in_blocks:
        return []
    kinds = sorted({tensor.blocks.kind.name for tensor in in_blocks if tensor.blocks is not None})
    stored = FLOATS[DTYPES[dtype] or in_blocks[0].dtype]
    return [
        f"matrices in {' and '.join(kinds)} are stored as {stored}, which takes more room; --quantize int8 "
        "leaves them as they are"
    ]


def _check_target(source: Path, target: Path) -> None:
    """Refuse a target that holds another format: its files have the same names as ours, and would be lost."""
    if target.resolve() == source.resolve():
        raise InputError(f"{target} is the model to import; name another folder to write")
    if not target.is_dir() or not any(target.iterdir()):
        return
    config = target / CONFIG
    if not config.is_file() or "pumice_format" not in read_json(config):
        raise InputError(f"{target} holds other files than a Pumice model; name a new folder")


def _origin(kind: FormatKind, loaded: LoadedParts) -> dict[str, Any]:
    if kind is FormatKind.OWN:
        return {}
    return {
        "imported": {
            "kind": kind.value,
            "by": f"pumice {__version__}",
            **{role: origin(name, path) for role, (name, path) in loaded.sources.items()},
            "assumed": list(loaded.notes),
        }
    }
