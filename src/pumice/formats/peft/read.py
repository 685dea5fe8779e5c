"""Read LoRA adapters in PEFT's format and apply them to a model.

Our own adapters are in the decoder, in the same layers of every block. Adapters of PEFT that are there as
well stay adapters; all others (in a vision tower, lm_head, a few blocks) are added to their weights.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor

from pumice.config import LoraConfig, ModelConfig
from pumice.config_json import naming
from pumice.errors import InputError, WorkError
from pumice.formats import names as tensor_names
from pumice.formats.peft.write import BASE, fingerprint
from pumice.formats.recognise import ADAPTER_CONFIG
from pumice.storage.json_file import Keys
from pumice.storage.outline import ValuesNotHere
from pumice.storage.parts import LoadedParts
from pumice.storage.tensors import LazyStateDict, LazyTensor, check_same, is_same, open_weights

_LORA_A, _LORA_B = ".lora_a", ".lora_b"  # our own names end so
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
# PEFT also stores the original weight of an adapted lm_head or embedding.
_COPY = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.weight")
_BLOCK = re.compile(r"decoder\.blocks\.(\d+)\.(?:attention|mlp)\.(\w+)\.weight")
# Initialisations that change the base weights as well.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def base_name(folder: Path) -> str:
    """Return the model that the adapter was trained on, from adapter_config.json; "" if it does not say."""
    return Keys.of(folder / ADAPTER_CONFIG).get("base_model_name_or_path", str, "")


def adapt(base: LoadedParts, folder: Path) -> LoadedParts:
    """Return the base with the folder's adapter. Raises InputError if the adapter does not fit the base."""
    if base.config.lora is not None:
        raise InputError(f"the base of {folder} has LoRA adapters of its own; merge them into it first")
    # 1. Read the adapter, as pairs A and B for each adapted weight.
    _check_base(base.state, folder)
    keys = Keys.of(folder / ADAPTER_CONFIG)
    config = _lora(keys)
    pairs = _pairs(open_weights(folder, "adapter_model"), base, keys, config)
    # 2. If every block of the decoder has adapters in the same layers, they stay adapters, else they are
    # merged.
    blocks = {_block(name) for name in pairs if _block(name)}
    targets = tuple(dict.fromkeys(block[1] for block in blocks if block))
    uniform = blocks == {(i, target) for i in range(base.config.decoder.depth) for target in targets}
    state = dict(base.state)
    lora = None
    for name, (a, b) in pairs.items():
        if uniform and _block(name):
            lora = config
            state[name.removesuffix("weight") + "lora_a"] = a
            state[name.removesuffix("weight") + "lora_b"] = b
        else:
            _check_fit(base.state[name], a, b, keys.label)
            state[name] = add_update(base.state[name], a, b, config.alpha / config.rank)
    # 3. The config lists the layers in our order.
    if lora is not None:
        order = [target for target in LoraConfig().targets if target in targets]
        lora = dataclasses.replace(lora, targets=tuple(order))
    merged = (
        (0 if uniform else len(blocks), "of the LLM's blocks", ", as the blocks do not all have the same"),
        (len(pairs) - len(blocks), "outside the LLM's blocks", ""),
    )
    notes = tuple(
        f"adapters merged into the weights {place}: {count}{why}" for count, place, why in merged if count
    )
    return dataclasses.replace(
        base, config=dataclasses.replace(base.config, lora=lora), state=state, notes=base.notes + notes
    )


def _check_base(state: LazyStateDict, folder: Path) -> None:
    path = folder / BASE  # only Pumice writes this file
    if not path.is_file():
        return
    expected = Keys.of(path).get("fingerprint", str)
    try:
        actual = fingerprint(state)
    except ValuesNotHere:  # of a base that is not fetched yet: it is compared then
        return
    if expected != actual:
        raise InputError(
            f"{path}: the adapter was trained on a base with the fingerprint {expected}, this has {actual}; "
            "name the right one with --base"
        )


def _lora(keys: Keys) -> LoraConfig:
    """Read the LoraConfig; alpha is such that alpha / rank is the factor that PEFT applies."""
    # What our adapters do not have is refused, so that no part of an adapter is lost in silence.
    keys.only("peft_type", ("LORA",), "LORA")
    keys.only("bias", ("none",), "none", "biases would be trained outside the adapter")
    for key in ("use_dora", "fan_in_fan_out", "use_qalora", "lora_bias"):
        keys.only(key, (False,), False)
    # The last two apply the adapter to some tokens only, or mix several.
    names = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "target_parameters")
    for key in (*names, "alora_invocation_tokens", "arrow_config"):
        if keys.values.get(key):
            raise InputError(
                f"{keys.label}: {key} is {keys.values[key]!r}, which cannot be read; it must be empty"
            )
    init = keys.values.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise InputError(
            f"{keys.label}: init_lora_weights {init!r} changes the base as well; convert it to a plain LoRA"
        )
    rank = keys.get("r", int)
    if rank < 1:
        raise InputError(f"{keys.label}: r is {rank}; it must be 1 or more")
    alpha = keys.get("lora_alpha", float)
    if keys.get("use_rslora", bool, False):  # arXiv 2312.03732 divides by the root of the rank
        alpha *= rank**0.5
    with naming(keys.label):
        return LoraConfig(rank=rank, alpha=alpha, dropout=keys.get("lora_dropout", float, 0.0))


def _pairs(
    tensors: LazyStateDict, base: LoadedParts, keys: Keys, lora: LoraConfig
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Return our name of each adapted weight -> A (rank, in) and B (out, rank), in the model's order."""
    table, modules = tensor_names.adapted(base.config), keys.values.get("target_modules")
    pairs: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        param_name = table.get(match[1]) if match else None
        copy = None if match else _COPY.fullmatch(name)
        if copy and (stored := table.get(copy[1])):
            if is_same(base.state[stored], tensor):
                continue
            raise InputError(
                f"{keys.label}: {name} ({tensor.origin}) was trained outside the adapter: it differs from "
                f"the base's {base.state[stored].origin or stored}, and only adapters can be read"
            )
        if match is None or param_name is None or param_name == "decoder.embed.weight":
            raise InputError(
                f"{keys.label}: its tensor {name} ({tensor.origin}) adapts no linear layer of the base"
            )
        if tensor.shape[match[2] == "B"] != lora.rank:
            raise InputError(f"{keys.label}: r is {lora.rank}, but {name} has the shape {list(tensor.shape)}")
        pair = pairs.setdefault(param_name, {})
        if match[2] in pair:
            check_same(pair[match[2]], tensor, keys.label)
        if isinstance(modules, list) and not any(f".{match[1]}".endswith(f".{module}") for module in modules):
            raise InputError(
                f"{keys.label}: target_modules is {', '.join(map(str, modules))}, but {name} "
                f"({tensor.origin}) adapts another layer; PEFT would leave it out: correct the list"
            )
        pair[match[2]] = tensor
    if not pairs:
        raise InputError(f"{keys.label}: its weights are empty")
    order = {name: number for number, name in enumerate(dict.fromkeys(table.values()))}
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise InputError(f"{keys.label}: {name} has only one of lora_A and lora_B")
    return {
        name: (pair["A"], pair["B"]) for name, pair in sorted(pairs.items(), key=lambda item: order[item[0]])
    }


def _block(name: str) -> tuple[int, str] | None:
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def _check_fit(weight: LazyTensor, a: LazyTensor, b: LazyTensor, label: str) -> None:
    update = [b.shape[0], a.shape[1]]
    if update != list(weight.shape):
        raise InputError(f"{label}: an update of {update} does not fit {weight.origin}, {list(weight.shape)}")


def add_update(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    """Return weight (out, in) + scale * b (out, rank) @ a (rank, in), computed in fp32 when it is read.

    Reading raises WorkError if `a` or `b` is not finite; the sum has the origin of `weight`, which may be
    sound.
    """

    def add(tensor: Tensor) -> Tensor:
        factors = b.read(torch.float32), a.read(torch.float32)
        for origin, factor in zip((b.origin, a.origin), factors, strict=True):
            if not bool(factor.isfinite().all()):
                raise WorkError(f"{origin or 'an adapter'} holds nan or inf; get the model again")
        update = scale * (factors[0] @ factors[1])
        return (tensor.float() + update).to(tensor.dtype)

    return weight.map(add)


def drop_adapters(config: ModelConfig, state: LazyStateDict) -> tuple[ModelConfig, LazyStateDict]:
    """Return the model without its adapters, as it was before they were trained."""
    weights = {name: tensor for name, tensor in state.items() if not name.endswith((_LORA_A, _LORA_B))}
    return dataclasses.replace(config, lora=None), weights


def merge_adapters(config: ModelConfig, state: LazyStateDict) -> tuple[ModelConfig, LazyStateDict]:
    """Return the model with its adapters added to its weights; the sums are computed when they are read."""
    merged_config, merged_state = drop_adapters(config, state)
    if config.lora is None:
        return merged_config, merged_state
    for name in [name for name in state if name.endswith(_LORA_A)]:
        layer = name.removesuffix(_LORA_A)
        a, b = state[name], state[layer + _LORA_B]
        scale = config.lora.alpha / config.lora.rank
        merged_state[f"{layer}.weight"] = add_update(state[f"{layer}.weight"], a, b, scale)
    return merged_config, merged_state
