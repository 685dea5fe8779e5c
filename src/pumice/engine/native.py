"""Compiled code (`kernels/native.c`) computes a few new tokens of several sequences faster than PyTorch.

It takes int8 or fp32 weights on a CPU. It is compiled once per machine, when an engine first needs it, and
stored in the cache folder. Without a C compiler, for other weights or devices, and with PUMICE_NATIVE=off,
PyTorch computes all tokens. The results are the same, except that PyTorch rounds activations beside int8
weights to bfloat16.

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
from pumice.model.layers import RMSNorm, rope_inv_freq
from pumice.model.quantized import Int8Linear

LANES, TILE = 16, 4  # as in native.c: input sizes are multiples of LANES, output sizes of TILE
# The most prompt tokens per step that native code takes. In fp32, PyTorch is faster with more
# (docs/speed.md). With int8 weights, PyTorch rounds activations differently, and an answer must not depend on
# how many others are computed. So PyTorch gets all prompts there.
MAX_PROMPT_ROWS = {"int8": 0, "fp32": 48}


class _Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _sizes = "depth width heads kv_heads head_dim mlp_width vocabulary capacity window"
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes.split()),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("inv_freq", "blocks", "norm")),
        ("head", _Linear),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class NativeDecoder:
    """A decoder and its KV cache, prepared for native.c, which reads their memory in place.

    max_prompt_rows: prompt tokens per step up to which this is faster than PyTorch.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, library: ctypes.CDLL, max_prompt_rows: int) -> None:
        self.max_prompt_rows = max_prompt_rows
        config = decoder.config
        self._decode = library.pumice_decode
        self._referenced: list[Any] = []  # C has their addresses: they must stay alive
        self._cache, self._width, self._vocabulary = cache, config.width, config.vocab_size
        blocks = (_Block * config.depth)(*(self._block(block) for block in decoder.blocks))
        self._referenced.append(blocks)
        inv_freq = rope_inv_freq(config.head_dim, config.rope_theta, config.rope_scaling, cache.keys.device)
        self._model = _Model(
            config.depth, config.width, config.heads, config.kv_heads, config.head_dim, config.mlp_width,
            config.vocab_size, cache.capacity, cache.window or 0, config.norm_eps,
            self._address(inv_freq), ctypes.addressof(blocks), self._address(decoder.norm.weight),
            self._linear(decoder.embed if decoder.head is None else decoder.head),
            self._address(cache.keys), self._address(cache.values),
        )  # fmt: skip

    def logits(self, x: Tensor, segments: Sequence[Segment], due: Sequence[int]) -> Tensor:
        """Run the decoder on embedded tokens x (R, D) of the segments, laid end to end.

        due: the rows whose logits are needed. Return logits (len(due), V) in fp32. The new keys and values
        are written to the cache. Raise MemoryError if the native code cannot allocate its buffers.
        """
        self._cache.check(segments)
        if x.shape != (sum(segment.new for segment in segments), self._width):
            raise ValueError(
                f"x is {tuple(x.shape)}; expected {self._width} values for each new token of {list(segments)}"
            )
        # A copy, because native.c overwrites x with the residual stream.
        x = x.to(torch.float32, copy=True).contiguous()
        positions = [n for _, past, new in segments for n in range(past, past + new)]
        starts = [start for start, _, new in segments for _ in range(new)]
        logits = torch.empty(len(due), self._vocabulary, dtype=torch.float32, device="cpu")
        error = self._decode(
            ctypes.byref(self._model), ctypes.c_int64(len(x)), ctypes.c_void_p(x.data_ptr()),
            _int64_array(positions), _int64_array(starts), ctypes.c_int64(len(due)), _int64_array(due),
            ctypes.c_void_p(logits.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        if error:
            raise MemoryError(
                f"no memory is left for a step of {len(x)} tokens; use a smaller `chunk` or fewer slots"
            )
        return logits

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._referenced.append(tensor)
        return tensor.data_ptr()

    def _linear(self, layer: Any, first: int = 0, last: int | None = None) -> _Linear:
        """Describe outputs `first` to `last` of a linear layer or an embedding to C."""
        tensors = (layer.weight, getattr(layer, "scale", None), getattr(layer, "bias", None))
        return _Linear(*(None if tensor is None else self._address(tensor[first:last]) for tensor in tensors))

    def _block(self, block: Any) -> _Block:
        attention, mlp = block.attention, block.mlp
        norms = (block.attention_norm, block.mlp_norm, attention.q_norm, attention.k_norm)
        q_width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        return _Block(
            *(self._address(part.weight) if isinstance(part, RMSNorm) else None for part in norms),
            *self._split_layers(attention, q_width, kv_width, kv_width),
            self._linear(attention.o),
            *self._split_layers(mlp, mlp.down.weight.shape[1], mlp.down.weight.shape[1]),
            self._linear(mlp.down),
        )

    def _split_layers(self, parent: Any, *outputs: int) -> list[_Linear]:
        """Return the layers that read the same input. Quantization may have joined them to one (`joins`)."""
        joined, names = parent.joins
        layer = getattr(parent, joined)
        if layer is None:
            return [self._linear(getattr(parent, name)) for name in names]
        ends = list(itertools.accumulate(outputs))
        return [self._linear(layer, end - count, end) for count, end in zip(outputs, ends, strict=True)]


def _int64_array(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def native_decoder(decoder: Decoder, cache: KVCache) -> NativeDecoder | None:
    """Return the decoder prepared for native code, or None if native code cannot run it."""
    weights = _supported_weights(decoder, cache)
    if weights is None:
        return None
    library, _ = compiled(weights)
    # Without OpenMP, native code uses one thread. PyTorch with several threads is faster then.
    if library is None or (torch.get_num_threads() > 1 and not library.pumice_threads()):
        return None
    return NativeDecoder(decoder, cache, library, MAX_PROMPT_ROWS[weights])


def _supported_weights(decoder: Decoder, cache: KVCache) -> Weights | None:
    """Return the kind of the decoder's weights, or None if native.c does not support them or their sizes."""
    config = decoder.config
    sizes = (config.width, config.heads * config.head_dim, config.mlp_width, config.head_dim)
    if any(size % LANES for size in sizes) or config.vocab_size % TILE:
        return None
    # 1. All layers that compute. The embedding is a look-up, which PyTorch does.
    parts = [part for part in decoder.modules() if not list(part.children()) and part is not decoder.embed]
    layers: list[Any] = [part for part in parts if not isinstance(part, RMSNorm | nn.Identity)]
    norms = [part.weight for part in parts if isinstance(part, RMSNorm)]
    # 2. All layers have the same kind of weights. What is not int8 then has one dtype, the type of the cache.
    others: list[Tensor] = [cache.keys, cache.values, *norms]
    if decoder.head is not None and all(isinstance(part, Int8Linear) for part in layers):
        weights: Weights = "int8"
        others += [t for part in layers for t in (part.scale, part.bias) if t is not None]
    elif all(type(part) is nn.Linear for part in layers):
        weights = "fp32"
        others += [decoder.embed.weight, *(t for part in layers for t in part.parameters())]
    else:
        return None
    dtype = torch.bfloat16 if weights == "int8" else torch.float32
    return weights if all(t.dtype == dtype and t.device.type == "cpu" for t in others) else None
