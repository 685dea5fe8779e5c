"""A model's state with the decoder's matrices in few bits, quantised when they are read, one at a time."""

from __future__ import annotations

import dataclasses

from pumice.config import DecoderConfig, ModelConfig
from pumice.errors import InputError
from pumice.formats.peft.read import add_update
from pumice.kernels.compute import quantize
from pumice.kernels.packed import GROUP, BlockFormat, PackedMatrix
from pumice.model.quantized import kind_of
from pumice.storage.tensors import Blocks, LazyStateDict, LazyTensor, close_last_file

_LORA = (".lora_a", ".lora_b")


def fits(config: DecoderConfig) -> bool:
    """Whether every matrix has rows of whole groups."""
    inner = config.heads * config.head_dim
    return not any(inputs % GROUP for inputs in (config.width, inner, config.mlp_width))


def in_few_bits(config: ModelConfig, state: LazyStateDict, bits: str) -> LazyStateDict:
    """The state with adapters merged and the decoder's matrices in blocks of "int8" or "int4".

    A matrix that is stored in blocks of as few bits stays as it is. Raises InputError where rows are no whole
    groups.
    """
    merged = without_adapters(config, state)
    return {
        name: _quantized(name, tensor, bits) if is_matrix(name, tensor) else tensor
        for name, tensor in merged.items()
    }


def stored_in_blocks(config: ModelConfig, state: LazyStateDict) -> bool:
    """Whether every matrix of the decoder is held in few bits as it stands."""
    blocks = [tensor.blocks for name, tensor in state.items() if is_matrix(name, tensor)]
    return config.lora is None and bool(blocks) and None not in blocks


def is_matrix(name: str, tensor: LazyTensor) -> bool:
    return name.startswith("decoder.") and len(tensor.shape) == 2


def without_adapters(config: ModelConfig, state: LazyStateDict) -> LazyStateDict:
    """The state with each adapter's update added to its matrix when that is read."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_LORA)}
    if config.lora is None:
        return kept
    scale = config.lora.alpha / config.lora.rank
    for name in [name for name in state if name.endswith(_LORA[0])]:
        layer = name.removesuffix(_LORA[0])
        if f"{layer}.weight" not in kept:
            raise InputError(f"{name} changes {layer}.weight, which the model does not hold")
        low, high = state[name], state[f"{layer}{_LORA[1]}"]
        kept[f"{layer}.weight"] = add_update(kept[f"{layer}.weight"], low, high, scale)
    return kept


def _quantized(name: str, tensor: LazyTensor, bits: str) -> LazyTensor:
    kind = kind_of(bits, name.removeprefix("decoder."), tensor.shape[1])
    if tensor.blocks is not None and (kind is BlockFormat.Q8_0 or tensor.blocks.kind is not BlockFormat.Q8_0):
        return tensor

    def packed() -> PackedMatrix:
        made = quantize(tensor.read(), kind, tensor.origin or name)
        close_last_file()  # the file's pages would count as memory until it is closed
        return made

    return dataclasses.replace(tensor, blocks=Blocks(kind, packed))
