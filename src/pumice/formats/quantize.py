"""Quantise the decoder's matrices in a state dict. Each is quantised when it is read, one at a time."""

from __future__ import annotations

import dataclasses

from pumice.config import DecoderConfig, ModelConfig
from pumice.formats.peft.read import merge_adapters
from pumice.kernels.compute import quantize
from pumice.kernels.packed import GROUP, BlockFormat, PackedMatrix
from pumice.model.quantized import kind_of
from pumice.storage.tensors import Blocks, LazyStateDict, LazyTensor, close_last_file


def can_quantize(config: DecoderConfig) -> bool:
    """Return whether the rows of every matrix are whole groups of 32."""
    inner = config.heads * config.head_dim
    return not any(inputs % GROUP for inputs in (config.width, inner, config.mlp_width))


def quantize_state(config: ModelConfig, state: LazyStateDict, bits: str) -> LazyStateDict:
    """Return the state with adapters merged and the decoder's matrices quantised to "int8" or "int4".

    A matrix that is stored in blocks of as few bits stays as it is. Raises InputError if the rows of a matrix
    are not whole groups.
    """
    _, merged = merge_adapters(config, state)
    return {
        name: _quantized(name, tensor, bits) if is_matrix(name, tensor) else tensor
        for name, tensor in merged.items()
    }


def stored_in_blocks(config: ModelConfig, state: LazyStateDict) -> bool:
    """Return whether every matrix of the decoder is stored in blocks, and none has an adapter."""
    blocks = [tensor.blocks for name, tensor in state.items() if is_matrix(name, tensor)]
    return config.lora is None and bool(blocks) and None not in blocks


def is_matrix(name: str, tensor: LazyTensor) -> bool:
    return name.startswith("decoder.") and len(tensor.shape) == 2


def _quantized(name: str, tensor: LazyTensor, bits: str) -> LazyTensor:
    kind = kind_of(bits, name.removeprefix("decoder."), tensor.shape[1])
    # Blocks of as few bits lose nothing when they stay. Quantising them again would.
    if tensor.blocks is not None and (kind is BlockFormat.Q8_0 or tensor.blocks.kind is not BlockFormat.Q8_0):
        return tensor

    def packed() -> PackedMatrix:
        matrix = quantize(tensor.read(), kind, tensor.origin or name)
        close_last_file()  # the file's pages would count as memory until it is closed
        return matrix

    return dataclasses.replace(tensor, blocks=Blocks(kind, packed))
