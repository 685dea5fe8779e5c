"""Quantise the decoder's matrices in a state dict. Each is quantised when it is read, one at a time."""

from __future__ import annotations

import dataclasses
import logging
import time

from pumice.config import DecoderConfig, ModelConfig
from pumice.formats.peft.read import merge_adapters
from pumice.kernels.compute import quantize
from pumice.kernels.packed import GROUP, BlockFormat, PackedMatrix
from pumice.model.quantized import kind_of
from pumice.progress import ProgressBar
from pumice.storage.tensors import MAPPED_BYTES, Blocks, LazyStateDict, LazyTensor, close_last_file

PATIENCE = 3.0  # seconds of quantising after which its progress is shown
_LOG = logging.getLogger(__name__)


def can_quantize(config: DecoderConfig) -> bool:
    """Return whether the rows of every matrix are whole groups of 32."""
    inner = config.heads * config.head_dim
    return not any(inputs % GROUP for inputs in (config.width, inner, config.mlp_width))


def quantize_state(config: ModelConfig, state: LazyStateDict, bits: str, hint: str = "") -> LazyStateDict:
    """Return the state with adapters merged and the decoder's matrices quantised to "int8" or "int4".

    A matrix that is stored in blocks of as few bits stays as it is. hint: logged once if quantising takes
    more than PATIENCE seconds; from then on a terminal shows the progress. Raises InputError if the rows of a
    matrix are not whole groups.
    """
    _, merged = merge_adapters(config, state)
    progress = _Progress(bits, hint)
    return {
        name: _quantized(name, tensor, bits, progress) if is_matrix(name, tensor) else tensor
        for name, tensor in merged.items()
    }


class _Progress:
    """Shows how many matrices have been quantised, if that takes long."""

    def __init__(self, bits: str, hint: str) -> None:
        self.total = self._done = 0
        self._bits, self._hint = bits, hint
        self._bar = ProgressBar()
        self._start: float | None = None

    def begin(self) -> None:
        if self._start is None:
            self._start = time.monotonic()

    def step(self) -> None:
        self._done += 1
        if self._start is None or time.monotonic() - self._start < PATIENCE:
            return
        if self._hint:
            _LOG.warning("%s", self._hint)
            self._hint = ""
        self._bar.show(self._done, self.total, f"matrix quantised to {self._bits}")
        if self._done == self.total:
            self.stop()

    def stop(self) -> None:
        self._bar.close()


def stored_in_blocks(config: ModelConfig, state: LazyStateDict) -> bool:
    """Return whether every matrix of the decoder is stored in blocks, and none has an adapter."""
    blocks = [tensor.blocks for name, tensor in state.items() if is_matrix(name, tensor)]
    return config.lora is None and bool(blocks) and None not in blocks


def stored_bits(state: LazyStateDict) -> str:
    """Return what tensors are quantised to: "int8", "int4", ggml's names of other types, or "" for none."""
    names = {t.stored_as if t.blocks is None else t.blocks.kind.name for t in state.values()}
    names -= {"", "F32", "F16", "BF16"}
    eight = {BlockFormat.Q8_0.name}
    if names == eight:
        return "int8"
    # Of int4, the embedding and the vocabulary projection have 8 bits (see `kind_of`).
    four = {BlockFormat.Q4_1.name, BlockFormat.Q4_K.name}
    return "int4" if names and names <= four | eight else " and ".join(sorted(names))


def kept_below(config: ModelConfig, state: LazyStateDict, bits: str) -> str:
    """Say which matrices were stored in fewer bits than were asked for, and stay so; "" if none were.

    Those with adapters do not stay so: merging gives them all their bits.
    """
    if bits != "int8":
        return ""
    _, merged = merge_adapters(config, state)
    kinds = {tensor.blocks.kind for tensor in merged.values() if tensor.blocks is not None}
    if not (fewer := sorted(kind.name for kind in kinds - {BlockFormat.Q8_0})):
        return ""
    return f"matrices in {' and '.join(fewer)} stay so: int8 cannot bring back what 4 bits lost"


def is_matrix(name: str, tensor: LazyTensor) -> bool:
    return name.startswith("decoder.") and len(tensor.shape) == 2


def _quantized(name: str, tensor: LazyTensor, bits: str, progress: _Progress) -> LazyTensor:
    kind = kind_of(bits, name.removeprefix("decoder."), tensor.shape[1])
    # Blocks of as few bits lose nothing when they stay. Quantising them again would.
    if tensor.blocks is not None and (kind is BlockFormat.Q8_0 or tensor.blocks.kind is not BlockFormat.Q8_0):
        return tensor
    progress.total += 1

    def packed() -> PackedMatrix:
        progress.begin()
        try:
            matrix = quantize(tensor.read(), kind, tensor.origin or name)
        except BaseException:
            progress.stop()
            raise
        close_last_file(MAPPED_BYTES)  # the file's pages would count as memory until it is closed
        progress.step()
        return matrix

    return dataclasses.replace(tensor, blocks=Blocks(kind, packed))
