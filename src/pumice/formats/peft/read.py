"""LoRA adapters in PEFT's file format, put onto a model.

Knows: adapter_config.json and the names of its tensors. Does not know: how the base was opened.

Our own adapters sit in the decoder's blocks, the same layers of every block. PEFT's that do the same stay
adapters; all others (a vision tower's, lm_head's, those of a few blocks) are added to their weights.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor

from pumice.config import LoraConfig, naming
from pumice.errors import InputError
from pumice.formats import names as tensor_names
from pumice.formats.peft.write import BASE, fingerprint
from pumice.formats.recognise import ADAPTER_CONFIG
from pumice.storage.json_file import Keys
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, LazyTensor, open_weights

_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
# PEFT writes out what an adapted lm_head or embedding was, too.
_COPY = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.weight")
_BLOCK = re.compile(r"decoder\.blocks\.(\d+)\.(?:attention|mlp)\.(\w+)\.weight")
# Initialisations that change the weights that the adapter is added to.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def base_name(folder: Path) -> str:
    """What adapter_config.json says that the adapter was trained on; "" when it does not."""
    return Keys.of(folder / ADAPTER_CONFIG).get("base_model_name_or_path", str, "")


def adapt(base: LoadedParts, folder: Path) -> LoadedParts:
    """The base with the folder's adapter. Raises InputError when it does not fit, or was made for another."""
    if base.config.lora is not None:
        raise InputError(f"the base of {folder} has LoRA adapters of its own; merge them into it first")
    _check_base(base.state, folder)
    keys = Keys.of(folder / ADAPTER_CONFIG)
    config = _lora(keys)
    pairs = _pairs(open_weights(folder, "adapter_model"), base, keys, config)
    blocks = {_block(name) for name in pairs if _block(name)}
    targets = tuple(dict.fromkeys(block[1] for block in blocks if block))
    uniform = blocks == {(i, target) for i in range(base.config.decoder.depth) for target in targets}
    state = dict(base.state)
    kept = None
    for name, (a, b) in pairs.items():
        if uniform and _block(name):
            kept = config
            state[name.removesuffix("weight") + "lora_a"] = a
            state[name.removesuffix("weight") + "lora_b"] = b
        else:
            _check_fit(base.state[name], a, b, keys.where)
            state[name] = add_update(base.state[name], a, b, config.alpha / config.rank)
    if kept is not None:
        order = [target for target in LoraConfig().targets if target in targets]
        kept = dataclasses.replace(kept, targets=tuple(order))
    merged = len(pairs) - len(blocks) * uniform
    notes = (f"{merged} adapted layers outside the LLM's blocks were merged",) if merged else ()
    return dataclasses.replace(
        base, config=dataclasses.replace(base.config, lora=kept), state=state, notes=base.notes + notes
    )


def _check_base(state: LazyStateDict, folder: Path) -> None:
    path = folder / BASE  # beside Pumice's adapters only
    if not path.is_file():
        return
    wanted = Keys.of(path).get("fingerprint", str)
    if wanted != (found := fingerprint(state)):
        raise InputError(
            f"{path}: the adapter was trained on a base with the fingerprint {wanted}, this has {found}; "
            "name the right one with --base"
        )


def _lora(keys: Keys) -> LoraConfig:
    """The adapter's shape. alpha stands for what makes alpha / rank the factor that PEFT applies."""
    keys.only("peft_type", ("LORA",), "LORA")
    keys.only("bias", ("none",), "none", "biases would be trained outside the adapter")
    for key in ("use_dora", "fan_in_fan_out", "use_qalora"):
        keys.only(key, (False,), False)
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "target_parameters"):
        if keys.values.get(key):
            raise InputError(
                f"{keys.where}: {key} is {keys.values[key]!r}, which cannot be read; it must be empty"
            )
    start = keys.values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise InputError(
            f"{keys.where}: init_lora_weights {start!r} changes the base as well; convert it to a plain LoRA"
        )
    rank = keys.get("r", int)
    if rank < 1:
        raise InputError(f"{keys.where}: r is {rank}; it must be 1 or more")
    alpha = keys.get("lora_alpha", float)
    if keys.get("use_rslora", bool, False):  # arXiv 2312.03732 divides by the root of the rank
        alpha *= rank**0.5
    with naming(keys.where):
        return LoraConfig(rank=rank, alpha=alpha, dropout=keys.get("lora_dropout", float, 0.0))


def _pairs(
    stored: LazyStateDict, base: LoadedParts, keys: Keys, lora: LoraConfig
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Our name of an adapted weight -> A (rank, in) and B (out, rank), in the model's order."""
    table = tensor_names.adapted(base.config)
    found: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match is None and _is_copy(name, tensor, table, base.state):
            continue
        ours = table.get(match[1]) if match else None
        if match is None or ours is None or ours == "decoder.embed.weight":
            raise InputError(
                f"{keys.where}: its tensor {name} ({tensor.origin}) adapts no linear layer of the base"
            )
        if tensor.shape[match[2] == "B"] != lora.rank:
            raise InputError(f"{keys.where}: r is {lora.rank}, but {name} has the shape {list(tensor.shape)}")
        found.setdefault(ours, {})[match[2]] = tensor
    if not found:
        raise InputError(f"{keys.where}: its weights are empty")
    order = {name: number for number, name in enumerate(dict.fromkeys(table.values()))}
    for name, pair in found.items():
        if len(pair) != 2:
            raise InputError(f"{keys.where}: {name} has only one of lora_A and lora_B")
    return {
        name: (pair["A"], pair["B"]) for name, pair in sorted(found.items(), key=lambda item: order[item[0]])
    }


def _is_copy(name: str, tensor: LazyTensor, table: tensor_names.Table, base: LazyStateDict) -> bool:
    """Whether the tensor is one of the base's, unchanged."""
    match = _COPY.fullmatch(name)
    ours = table.get(match[1]) if match else None
    if ours is None or base[ours].shape != tensor.shape:
        return False
    return torch.equal(base[ours].read(torch.float32), tensor.read(torch.float32))


def _block(name: str) -> tuple[int, str] | None:
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def _check_fit(weight: LazyTensor, a: LazyTensor, b: LazyTensor, where: str) -> None:
    update = [b.shape[0], a.shape[1]]
    if update != list(weight.shape):
        raise InputError(f"{where}: an update of {update} does not fit {weight.origin}, {list(weight.shape)}")


def add_update(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    """weight (out, in) + scale * b (out, rank) @ a (rank, in), computed in fp32 when it is read."""

    def add(tensor: Tensor) -> Tensor:
        update = scale * (b.read(torch.float32) @ a.read(torch.float32))
        return (tensor.float() + update).to(tensor.dtype)

    return weight.then(add)
