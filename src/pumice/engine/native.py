"""A few new tokens of several sequences in one call of compiled code (`native.c`), where that can be had.

Knows the tensors of an int8 or fp32 decoder and the C compiler of this machine. The code is compiled once
per machine, when an engine with such weights first opens on a CPU, and kept in the cache folder. Without a
compiler, for other weights and devices, and with PUMICE_NATIVE=off, PyTorch's operations serve: more slowly,
and the same but for rounding activations to bfloat16 beside int8.

Shapes: R rows (one new token each), D width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumice.kernels.loader import Weights, compiled
from pumice.model.cache import KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.layers import RMSNorm, frequencies
from pumice.model.quantized import Int8Linear

LANES, TILE = 16, 4  # as in native.c: inputs are whole LANES, outputs whole TILEs
# Tokens of prompts in one step: with more in fp32, PyTorch's operations are faster (docs/speed.md). Beside
# int8 these round activations otherwise, and an answer must not depend on how many others ask: there they
# get all prompts.
ROWS = {"int8": 0, "fp32": 48}


class _Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _sizes = "depth width heads kv_heads head_width mlp_width vocabulary places window"
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes.split()),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("turning", "blocks", "norm")),
        ("head", _Linear),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class NativeDecoder:
    """A decoder and its cache as `native.c` reads them, in place. rows: of a prompt, what it is good for."""

    def __init__(self, decoder: Decoder, cache: KVCache, code: ctypes.CDLL, rows: int) -> None:
        self.rows = rows
        config = decoder.config
        self._decode = code.pumice_decode
        self._kept: list[Any] = []  # what C has addresses of
        self._cache, self._width, self._vocabulary = cache, config.width, config.vocab_size
        blocks = (_Block * config.depth)(*(self._block(block) for block in decoder.blocks))
        self._kept.append(blocks)
        turning = frequencies(config.head_width, config.rope_base, config.rope_scaling, cache.keys.device)
        self._model = _Model(
            config.depth, config.width, config.heads, config.kv_heads, config.head_width, config.mlp_width,
            config.vocab_size, cache.places, cache.window or 0, config.norm_eps,
            self._address(turning), ctypes.addressof(blocks), self._address(decoder.norm.weight),
            self._linear(decoder.embed if decoder.head is None else decoder.head),
            self._address(cache.keys), self._address(cache.values),
        )  # fmt: skip

    def logits(self, x: Tensor, segments: Sequence[Segment], due: Sequence[int]) -> Tensor:
        """Embedded tokens of the segments, x (R, D) -> logits (len(due), V) after these rows, in fp32."""
        self._cache.check(segments)
        if x.shape != (sum(segment.new for segment in segments), self._width):
            raise ValueError(
                f"x is {tuple(x.shape)}; expected {self._width} values for each new token of {list(segments)}"
            )
        x = x.to(torch.float32, copy=True).contiguous()
        positions = [n for _, past, new in segments for n in range(past, past + new)]
        starts = [start for start, _, new in segments for _ in range(new)]
        logits = torch.empty(len(due), self._vocabulary, dtype=torch.float32, device="cpu")
        failed = self._decode(
            ctypes.byref(self._model), ctypes.c_int64(len(x)), ctypes.c_void_p(x.data_ptr()),
            _integers(positions), _integers(starts), ctypes.c_int64(len(due)), _integers(due),
            ctypes.c_void_p(logits.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"a step of {len(x)} tokens found no memory")
        return logits

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, layer: Any, first: int = 0, last: int | None = None) -> _Linear:
        """Some outputs of a linear layer, or of an embedding as one."""
        kept = (layer.weight, getattr(layer, "scale", None), getattr(layer, "bias", None))
        return _Linear(*(None if tensor is None else self._address(tensor[first:last]) for tensor in kept))

    def _block(self, block: Any) -> _Block:
        attention, mlp = block.attention, block.mlp
        norms = (block.attention_norm, block.mlp_norm, attention.q_norm, attention.k_norm)
        inner, shared = attention.heads * attention.head_width, attention.shared * attention.head_width
        return _Block(
            *(self._address(part.weight) if isinstance(part, RMSNorm) else None for part in norms),
            *self._parts(attention, inner, shared, shared),
            self._linear(attention.o),
            *self._parts(mlp, mlp.down.weight.shape[1], mlp.down.weight.shape[1]),
            self._linear(mlp.down),
        )

    def _parts(self, parent: Any, *outputs: int) -> list[_Linear]:
        """The layers that read the same input, which may have become one (`joins` of their module)."""
        joined, names = parent.joins
        layer = getattr(parent, joined)
        if layer is None:
            return [self._linear(getattr(parent, name)) for name in names]
        ends = list(itertools.accumulate(outputs))
        return [self._linear(layer, end - count, end) for count, end in zip(outputs, ends, strict=True)]


def _integers(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def native_decoder(decoder: Decoder, cache: KVCache) -> NativeDecoder | None:
    """The decoder for compiled code, or None where that does not serve."""
    weights = _fits(decoder, cache)
    if weights is None:
        return None
    code, _ = compiled(weights)
    if code is None or (torch.get_num_threads() > 1 and not code.pumice_threads()):
        return None
    return NativeDecoder(decoder, cache, code, ROWS[weights])


def _fits(decoder: Decoder, cache: KVCache) -> Weights | None:
    """Which weights the decoder has, if they and all sizes are such as native.c takes."""
    config = decoder.config
    sizes = (config.width, config.heads * config.head_width, config.mlp_width, config.head_width)
    if any(size % LANES for size in sizes) or config.vocab_size % TILE:
        return None
    parts = [part for part in decoder.modules() if not list(part.children()) and part is not decoder.embed]
    layers: list[Any] = [part for part in parts if not isinstance(part, RMSNorm | nn.Identity)]
    norms = [part.weight for part in parts if isinstance(part, RMSNorm)]
    small: list[Tensor] = [cache.keys, cache.values, *norms]
    if decoder.head is not None and all(isinstance(part, Int8Linear) for part in layers):
        weights: Weights = "int8"
        small += [t for part in layers for t in (part.scale, part.bias) if t is not None]
    elif all(type(part) is nn.Linear for part in layers):
        weights = "fp32"
        small += [decoder.embed.weight, *(t for part in layers for t in part.parameters())]
    else:
        return None
    dtype = torch.bfloat16 if weights == "int8" else torch.float32
    return weights if all(t.dtype == dtype and t.device.type == "cpu" for t in small) else None
