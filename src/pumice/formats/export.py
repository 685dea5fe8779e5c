"""Export a model to the formats of other programs, after checking that the format can hold it.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pumice.config import ModelConfig
from pumice.errors import InputError, check_known
from pumice.formats.gguf import ollama
from pumice.formats.gguf import write as gguf_write
from pumice.formats.hf import refusal as hf_refusal
from pumice.formats.hf import write as hf_write
from pumice.formats.hf.read import read_generation
from pumice.formats.import_ import DTYPES
from pumice.formats.llava import write as llava_write
from pumice.formats.load import shapes
from pumice.formats.peft import write as peft_write
from pumice.formats.peft.read import drop_adapters, merge_adapters
from pumice.formats.pumice.folder import check, writing
from pumice.formats.read import read_model
from pumice.formats.text.chat_template import difference
from pumice.formats.text.read import read_text_side
from pumice.model.adapters import add_lora
from pumice.model.decoder import Decoder
from pumice.model.layers import Causal
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict
from pumice.templates import Template, get_template
from pumice.tokens import Tokenizer

# Each format's function that says why it cannot hold a model, or None.
REFUSALS: dict[str, Callable[[ModelConfig], str | None]] = {
    "hf": hf_refusal.refusal,
    "llava": llava_write.refusal,
    "gguf": gguf_write.refusal,
    "ollama": lambda config: gguf_write.refusal(config) or ollama.refusal(config),
    "peft": peft_write.refusal,
}
FORMATS = tuple(REFUSALS)
_COMPARED = ("decoder", "vision", "connector", "image")  # what `_check_written` compares of a whole model
_PROBE = 32  # the number of tokens on which the merged model is compared
# The largest change of a logit when adapters are merged, as a share of the largest logit. Merged weights are
# rounded to the type that they are stored in; nothing else differs. Measured on small models: 3.9e-6, 2.8e-3,
# 2.2e-2.
_MAX_CHANGE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Exported:
    """The folder that was written, and notes for the user."""

    folder: Path
    notes: tuple[str, ...]


def export(
    model: LoadedParts,
    to: str,
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    kind: str | None = None,
    tower_kind: str | None = None,
    class_token: str | None = None,
    drop_lora: bool = False,
    tower: str | None = None,
) -> Exported:
    """Write the model into the new folder `target`, in the format `to`, one of FORMATS.

    dtype: one of DTYPES, for hf, llava and peft; by default "keep", which leaves the stored types. kind,
    tower_kind, class_token: for gguf and ollama, as in `gguf.write.write`. drop_lora: leave the adapters out
    instead of merging them. tower: for llava, what its code builds the tower from. Raises InputError if the
    format cannot hold the model or does not take an option that is given, or the target exists; WorkError if
    the disk fails. The folder appears complete or not at all.
    """
    # 1. Refuse before anything is written.
    check_known(to, FORMATS, f"there is no format {to!r} to export to")
    if reason := refusal(to, model.config):
        raise InputError(f"this model cannot be exported to {to}: {reason}")
    in_gguf = to in ("gguf", "ollama")
    if in_gguf and dtype is not None:
        raise InputError(f"--dtype is not for {to}; give the type of its matrices with --type instead")
    dtype = "keep" if dtype is None else dtype
    check_known(dtype, DTYPES, f"there is no type {dtype!r} to store")
    if not in_gguf and (kind, tower_kind, class_token) != (None, None, None):
        raise InputError(
            f"--type, --mmproj-type and --class-token are not for {to}; give the type of its weights with "
            "--dtype"
        )
    if tower is not None and to != "llava":
        raise InputError(f"--tower-name is not for {to}, whose files hold the tower; leave it out")
    if drop_lora and to == "peft":
        raise InputError("--drop-lora is not for peft, which holds the adapters alone; leave it out")
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists already; give a new folder, or remove it first")
    check(model.state, shapes(model.config), "the model")
    # 2. Only peft has adapters beside the weights.
    config, state = model.config, model.state
    if to != "peft":
        config, state = (drop_adapters if drop_lora else merge_and_compare)(config, state)
    if (torch_dtype := DTYPES[dtype]) is not None:
        state = {name: tensor.cast(torch_dtype) for name, tensor in state.items()}
    model = replace(model, config=config, state=state)
    # 3. Write into a folder that gets its name when it is complete.
    notes: list[str] = []
    with writing(target, state) as fresh:
        if to == "hf":
            notes = hf_write.write(fresh, model)
        elif to == "llava":
            notes = llava_write.write(fresh, model, tower)
        elif in_gguf:
            kind = "f16" if kind is None else kind
            class_token = "first" if class_token is None else class_token
            notes = gguf_write.write(fresh, model, kind, tower_kind, class_token)
            if to == "ollama":
                notes += ollama.write_modelfile(fresh, model.config, Tokenizer(model.tokenizer))
        else:
            peft_write.write(fresh, model)
        _check_written(to, fresh, model)
    if config.boxes != "padded":
        notes.append(f"its files do not say that this model writes boxes in the form {config.boxes}")
    return Exported(target, tuple(notes))


def _check_written(to: str, folder: Path, model: LoadedParts) -> None:
    """Read what was written, and raise InputError if a field comes back as another model's."""
    expected = model.config if to == "llava" else hf_write.as_mlp(model).config
    if to == "peft":
        return  # adapters alone
    if to in ("hf", "llava"):
        _check_text_side(to, folder, model)
    written = read_model(folder, template="plain").config  # any: the original code's files say none
    parts = _COMPARED if expected.vision.kind != "none" else ("decoder",)
    if to in ("gguf", "ollama"):
        decoder, vision = expected.decoder, expected.vision
        # The window limits the context there; `gguf_write.write` tells so. Layers count from the end.
        context = min(decoder.context, decoder.sliding_window or decoder.context)
        decoder = replace(decoder, context=context, sliding_window=None)
        states = vision.depth + 1
        vision = replace(vision, layer=vision.layer % states - states)
        expected = replace(expected, decoder=decoder, vision=vision)
    pairs = [(part, getattr(expected, part), getattr(written, part)) for part in parts]
    for part, before, after in pairs:
        if part == "image":
            # Only a model that pads needs its colour, which `refusal` compares. `square_notes` tells what
            # several pictures become.
            before = replace(before, several=after.several, pad_color=after.pad_color)
        if part == "image" and after.several == "square" and before.max_tiles is None:
            # There, squares need a limit; `anyres_max` writes one that no picture reaches.
            before = replace(before, max_tiles=after.max_tiles)
        for field in dataclasses.fields(before):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if old != new and field.name != "vocab_size":  # which grows by the token <image>
                raise InputError(
                    f"{to} does not keep {part}.{field.name}: {old!r} would come back as {new!r}; share the "
                    "Pumice folder itself"
                )


def _check_text_side(to: str, folder: Path, model: LoadedParts) -> None:
    """The same of how a conversation is written, where an answer ends, and how it is drawn."""
    config = model.config
    text = read_text_side(folder, Keys.of(folder / "config.json"))
    pairs: list[tuple[str, object, object]] = [
        ("generation", config.generation.used, read_generation(folder)),
        ("bos_token_id", config.bos_token_id, text.files.bos_id),
        ("stop_token_ids", config.stop_token_ids, text.stop_ids),
    ]
    lost = [f"{name}: {old!r} would come back as {new!r}" for name, old, new in pairs if old != new]
    template = get_template(config.template, config.chat)
    if to == "hf" and isinstance(template, Template):
        source = text.files.chat_template or ""
        specials = list(Tokenizer(text.tokenizer).special)
        if reason := difference(source, template, config.image_wrap, specials):
            lost.append(f"chat template: {reason}")
    if lost:
        raise InputError(f"{to} does not keep the {lost[0]}; share the Pumice folder itself")


def refusal(to: str, config: ModelConfig) -> str | None:
    """Return why the format cannot hold the model and what to do instead; None if it can."""
    reason = REFUSALS[to](config)
    if reason is None:
        return None
    others = [other for other in ("hf", "llava", "gguf") if REFUSALS[other](config) is None]
    return f"{reason}; {f'use --to {others[0]}' if others else 'share the Pumice folder itself'}"


def merge_and_compare(config: ModelConfig, state: LazyStateDict) -> tuple[ModelConfig, LazyStateDict]:
    """Merge the adapters. Raises InputError unless the logits stay those of the model with adapters."""
    merged_config, merged_state = merge_adapters(config, state)
    if config.lora is None:
        return merged_config, merged_state
    # In a 16-bit type, rounding can swallow a small update.
    expected, actual = probe(config, state), probe(merged_config, merged_state)
    change = ((expected - actual).abs().max() / expected.abs().max()).item()
    allowed = _MAX_CHANGE[state["decoder.embed.weight"].dtype]
    if not change <= allowed:  # true for a change that is not a number, too
        raise InputError(
            f"merging the LoRA adapters would move the logits by {change:.1%} of the largest, more than the "
            f"{allowed:.2%} of rounding; export the adapters by themselves with --to peft"
        )
    return merged_config, merged_state


@torch.inference_mode()
def probe(config: ModelConfig, state: LazyStateDict) -> Tensor:
    """Return the decoder's logits (T, V) in fp32 on fixed random ids, with one block in memory."""
    # 1. The modules without values. A block's are read when it runs, and freed after it.
    with torch.device("meta"):
        decoder = Decoder(config.decoder)
        if config.lora is not None:
            add_lora(decoder, config.lora)
    decoder.eval()  # without the adapters' dropout, which is for training
    for number, block in enumerate(decoder.blocks):
        block.register_forward_pre_hook(
            lambda block, _, n=number: _read(block, f"decoder.blocks.{n}.", state)
        )
        block.register_forward_hook(lambda block, *_: _drop(block))
    for name in ("embed", "norm") if config.decoder.tied_head else ("embed", "norm", "head"):
        _read(getattr(decoder, name), f"decoder.{name}.", state)
    # 2. One forward pass.
    ids = torch.randint(config.decoder.vocab_size, (1, _PROBE), generator=torch.Generator().manual_seed(0))
    hidden = decoder(decoder.embed(ids), torch.arange(_PROBE)[None], Causal(config.decoder))
    return decoder.logits(hidden[0])


def _read(module: nn.Module, prefix: str, state: LazyStateDict) -> None:
    tensors = {name: state[prefix + name].read(torch.float32) for name in module.state_dict()}
    module.load_state_dict(tensors, assign=True)


def _drop(module: nn.Module) -> None:
    module.to("meta")
