"""Models written for others: which formats there are, what each cannot hold, and adapters on the way out.

Knows: the order of the work. Everything is refused before anything is written, and a folder appears whole
or not at all. Does not know: how any format looks, or where a model comes from.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pumice.config import ModelConfig
from pumice.errors import InputError
from pumice.formats.gguf import write as gguf_write
from pumice.formats.hf import write as hf_write
from pumice.formats.import_ import DTYPES
from pumice.formats.llava import write as llava_write
from pumice.formats.load import shapes
from pumice.formats.peft import write as peft_write
from pumice.formats.peft.read import add_update
from pumice.formats.pumice.folder import check, writing
from pumice.model.adapters import add_lora
from pumice.model.layers import Block, Causal, RMSNorm, rotary
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict

REFUSALS: dict[str, Callable[[ModelConfig], str | None]] = {
    "hf": hf_write.refusal,
    "llava": llava_write.refusal,
    "gguf": gguf_write.refusal,
    "peft": peft_write.refusal,
}
FORMATS = tuple(REFUSALS)
_LORA = (".lora_a", ".lora_b")
_PROBE = 32  # tokens on which merged adapters are compared
# How far logits may move when adapters are merged, as a share of the largest: merged weights are rounded to
# the type they are stored in, which is all that differs. Measured on small models: 3.9e-6, 2.8e-3, 2.2e-2.
_MOVED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Exported:
    """What was written, and what is worth knowing of it."""

    folder: Path
    notes: tuple[str, ...]


def export(
    model: LoadedParts,
    to: str,
    target: str | os.PathLike[str],
    *,
    dtype: str = "keep",
    kind: str = "f16",
    drop_lora: bool = False,
    tower: str | None = None,
) -> Exported:
    """Write the model for others into the new folder `target`. to: one of FORMATS.

    dtype: of DTYPES, for hf, llava and peft; "keep" is as stored. kind: of GGUF's matrices. drop_lora:
    leave the adapters out instead of merging them. tower: for llava, what its code builds the tower from.
    Raises InputError when the format cannot hold the model, or the target exists; WorkError when the disk
    fails. Nothing half-written is left behind.
    """
    if to not in REFUSALS:
        raise InputError(f"there is no format {to!r} to export to; use one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise InputError(f"there is no type {dtype!r} to store; use one of {', '.join(DTYPES)}")
    if to == "gguf" and dtype != "keep":
        raise InputError(
            "dtype is not for gguf, whose matrices have a type of their own; give --type instead"
        )
    if reason := refusal(to, model.config):
        raise InputError(f"this model cannot be exported to {to}: {reason}")
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists already; give a new folder, or remove it first")
    check(model.state, shapes(model.config), "the model")
    config, state = model.config, model.state
    if to != "peft":
        config, state = (without_lora if drop_lora else merged)(config, state)
    if (wanted := DTYPES[dtype]) is not None:
        state = {name: tensor.cast(wanted) for name, tensor in state.items()}
    model = replace(model, config=config, state=state)
    notes: list[str] = []
    with writing(target, state) as fresh:
        if to == "hf":
            notes = hf_write.write(fresh, model)
        elif to == "llava":
            notes = llava_write.write(fresh, model, tower)
        elif to == "gguf":
            notes = gguf_write.write(fresh, model, kind)
        else:
            peft_write.write(fresh, model)
    return Exported(target, tuple(notes))


def refusal(to: str, config: ModelConfig) -> str | None:
    """Why the format cannot hold the model, and what to do instead; None when it can."""
    reason = REFUSALS[to](config)
    if reason is None:
        return None
    others = [other for other in ("hf", "llava", "gguf") if REFUSALS[other](config) is None]
    return f"{reason}; {f'use --to {others[0]}' if others else 'share the Pumice folder itself'}"


def without_lora(config: ModelConfig, state: LazyStateDict) -> tuple[ModelConfig, LazyStateDict]:
    """The model as it was before its adapters were trained."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_LORA)}
    return replace(config, lora=None), kept


def merged(config: ModelConfig, state: LazyStateDict) -> tuple[ModelConfig, LazyStateDict]:
    """The model with its adapters in its weights, which are computed when they are read.

    Raises InputError unless it gives the logits of the model with adapters beside its weights.
    """
    lora = config.lora
    plain, kept = without_lora(config, state)
    if lora is None:
        return plain, kept
    for name in [name for name in state if name.endswith(".lora_a")]:
        layer = name.removesuffix(".lora_a")
        low, high = state[name], state[f"{layer}.lora_b"]
        kept[f"{layer}.weight"] = add_update(state[f"{layer}.weight"], low, high, lora.alpha / lora.rank)
    with_adapters, without = (probe(c, s) for c, s in ((config, state), (plain, kept)))
    moved = ((with_adapters - without).abs().max() / with_adapters.abs().max()).item()
    allowed = _MOVED[state["decoder.embed.weight"].dtype]
    if not moved <= allowed:  # not a number is refused as well
        raise InputError(
            f"merging the LoRA adapters would move the logits by {moved:.1%} of the largest, more than the "
            f"{allowed:.2%} of rounding; export the adapters by themselves with --to peft"
        )
    return plain, kept


@torch.inference_mode()
def probe(config: ModelConfig, state: LazyStateDict) -> Tensor:
    """Logits (T, V) in fp32 of the decoder on fixed random ids; one block at a time is in memory."""
    decoder = config.decoder
    ids = torch.randint(decoder.vocab_size, (1, _PROBE), generator=torch.Generator().manual_seed(0))
    x = F.embedding(ids, state["decoder.embed.weight"].read().float())
    cos, sin = rotary(torch.arange(_PROBE)[None], decoder)
    attend = Causal(decoder.sliding_window)
    for number in range(decoder.depth):
        with torch.device("meta"):
            block = Block(decoder, number)
            if config.lora is not None:
                add_lora(block, config.lora)
        prefix = f"decoder.blocks.{number}."
        own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        block.eval()  # a dropout of the adapters belongs to training
        block.load_state_dict({name: t.read(torch.float32) for name, t in own.items()}, assign=True)
        x = block(x, cos, sin, attend)
    norm = RMSNorm(decoder.width, decoder.norm_eps)
    norm.weight.copy_(state["decoder.norm.weight"].read())
    head = state["decoder.embed.weight" if decoder.tied_head else "decoder.head.weight"]
    return F.linear(norm(x[0]), head.read(torch.float32))
