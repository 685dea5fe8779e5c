"""Run a decoder on the new tokens of several sequences in one call of compiled code, `kernels/decode.c`.

It runs decoders of packed or fp32 weights on a CPU, if their modules are Pumice's own. The code is compiled
once per machine, when an engine with such weights is first created, and kept in the cache folder. Without a
compiler, for other weights, modules and devices, and with PUMICE_NATIVE=off, the engine uses PyTorch, which
is slower.

Shapes: R rows (one new token each), D width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumice.capability import LLAMA, Capability, fields
from pumice.config import DecoderConfig, RopeScaling
from pumice.engine.snapshot import GLOBAL_HOOKS, functions, is_patched
from pumice.errors import WorkError
from pumice.kernels.compute import PackedStruct, packed_struct
from pumice.kernels.loader import Weights, compiled
from pumice.model.adapters import LoraLinear
from pumice.model.cache import KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.layers import MLP, Attention, Block, RMSNorm, rope_inv_freq
from pumice.model.quantized import PackedEmbedding, PackedLinear
from pumice.model.quantized_base import QuantizedLinear

_LOG = logging.getLogger(__name__)
_TOLD: weakref.WeakSet[Decoder] = weakref.WeakSet()  # decoders that were said to be edited
# As in vectors.h and dense.h. Head widths, and all inputs in fp32, must be multiples of LANES. Outputs in
# fp32 must be multiples of TILE.
LANES, TILE = 16, 4
# Prompt tokens per step up to which compiled code is faster. With more, PyTorch is faster in fp32
# (docs/speed.md).
MAX_PROMPT_ROWS = {"packed": math.inf, "fp32": 48}
TRIAL_ROWS = 4  # tokens of the first step that PyTorch computes as well
CAPABILITY = Capability(
    "compiled code",
    {
        DecoderConfig: fields(LLAMA),
        RopeScaling: fields("kind factor low_freq_factor high_freq_factor original_context"),
    },
)
# The modules that decode.c computes. A subclass may compute something else.
_MODULES = (
    Decoder, Block, Attention, MLP, RMSNorm, nn.ModuleList, nn.Identity,
    nn.Linear, nn.Embedding, PackedLinear, PackedEmbedding,
)  # fmt: skip
# The largest difference from PyTorch's logits at the first step, as a share of the largest logit. Packed
# products round activations to 8 bits, and a value on the edge may fall on either side (measured: 5e-2).
# A wrong activation function differs by more than half.
_MAX_DIFFERENCE = {"packed": 0.25, "fp32": 1e-3}


class _Dense(ctypes.Structure):
    _fields_ = [
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


def _structures(linear: type[ctypes.Structure]) -> tuple[Any, Any]:
    """Return the structs `Block` and `Model` of decode.c, with `linear` as the type of their layers."""

    class BlockStruct(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
            *((name, linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ]

    class ModelStruct(ctypes.Structure):
        _sizes = "depth width heads kv_heads head_dim mlp_width vocabulary capacity block window"
        _fields_ = [
            *((name, ctypes.c_int64) for name in _sizes.split()),
            ("eps", ctypes.c_float),
            *((name, ctypes.c_void_p) for name in ("inv_freq", "blocks", "norm")),
            ("head", linear),
            ("keys", ctypes.c_void_p),
            ("values", ctypes.c_void_p),
        ]

    return BlockStruct, ModelStruct


_STRUCTURES = {"packed": _structures(PackedStruct), "fp32": _structures(_Dense)}


class NativeDecoder:
    """A decoder and its KV cache, prepared for decode.c, which reads their memory in place.

    max_prompt_rows: prompt tokens per step up to which this is faster than PyTorch. compared: whether
    `agrees` had numbers to compare.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, library: ctypes.CDLL, weights: Weights) -> None:
        self.max_prompt_rows = MAX_PROMPT_ROWS[weights]
        self.compared = False
        self._source = decoder, library, weights
        config = decoder.config
        self._decode = library.pumice_decode
        self._referenced: list[Any] = []  # C has their addresses: they must stay alive
        self._cache, self._width, self._vocabulary = cache, config.width, config.vocab_size
        self._block_type, model_type = _STRUCTURES[weights]
        blocks = (self._block_type * config.depth)(*(self._block(block) for block in decoder.blocks))
        self._referenced.append(blocks)
        inv_freq = rope_inv_freq(config.head_dim, config.rope_theta, config.rope_scaling, cache.keys.device)
        self._model = model_type(
            config.depth, config.width, config.heads, config.kv_heads, config.head_dim, config.mlp_width,
            config.vocab_size, cache.capacity, cache.block, config.sliding_window or 0, config.norm_eps,
            self._address(inv_freq), ctypes.addressof(blocks), self._address(decoder.norm.weight),
            self._linear(decoder.embed if decoder.head is None else decoder.head),
            self._address(cache.keys), self._address(cache.values),
        )  # fmt: skip

    def logits(self, x: Tensor, segments: Sequence[Segment], due: Sequence[int]) -> Tensor:
        """Run the decoder on embedded tokens x (R, D) of the segments, laid end to end.

        due: the rows whose logits are needed. Return logits (len(due), V) in fp32. The new keys and values
        are written to the cache. Raise WorkError if the native code cannot allocate its buffers.
        """
        self._cache.check(segments)
        if x.shape != (sum(segment.new for segment in segments), self._width):
            raise ValueError(
                f"x is {tuple(x.shape)}; expected {self._width} values for each new token of {list(segments)}"
            )
        # A copy, because decode.c overwrites x with the residual stream.
        x = x.to(torch.float32, copy=True).contiguous()
        positions = [n for _, past, new in segments for n in range(past, past + new)]
        # All tables, one after the other, and for each row where its own begins.
        blocks = list(itertools.chain.from_iterable(table for table, _, _ in segments))
        ends = list(itertools.accumulate(len(table) for table, _, _ in segments))
        tables = [
            end - len(table) for end, (table, _, new) in zip(ends, segments, strict=True) for _ in range(new)
        ]
        # Runs (first row, rows) attend together, if the code can; their sums differ from those of a row that
        # attends alone. So the last token of a sequence always attends alone if its logits are due, and all
        # others in a run, even of one row: then it does not matter how much of the sequence was cached.
        row_ends = list(itertools.accumulate(segment.new for segment in segments))
        single, runs = list(range(len(x))), list[tuple[int, int]]()
        if self._source[2] == "packed":
            single = sorted({end - 1 for end in row_ends} & {*due})
            runs = [
                (end - segment.new, count)
                for end, segment in zip(row_ends, segments, strict=True)
                if (count := segment.new - (end - 1 in single)) > 0
            ]
        logits = torch.empty(len(due), self._vocabulary, dtype=torch.float32, device="cpu")
        error = self._decode(
            ctypes.byref(self._model), ctypes.c_int64(len(x)), ctypes.c_void_p(x.data_ptr()),
            _int64_array(positions), _int64_array(blocks), _int64_array(tables),
            ctypes.c_int64(len(runs)), _int64_array([*itertools.chain(*runs)]),
            ctypes.c_int64(len(single)), _int64_array(single),
            ctypes.c_int64(len(due)), _int64_array(due),
            ctypes.c_void_p(logits.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        if error:
            raise WorkError(
                f"no memory is left for a step of {len(x)} tokens; use a smaller `chunk` or fewer slots"
            )
        return logits

    def agrees(self, x: Tensor) -> bool:
        """Return whether the logits after x are PyTorch's, but for rounding.

        x: (R, D), taken as a sequence of its own. So a forward function that was replaced in a class is
        noticed as well. The cache is left alone.
        """
        decoder, library, weights = self._source
        cache = KVCache(decoder.config, len(x), self._cache.keys.device, self._cache.keys.dtype)
        segments = [Segment(range(cache.blocks), 0, len(x))]
        hidden = decoder(x[None], cache.positions(segments), cache.attend(segments))
        reference = decoder.logits(hidden[0, -1:])
        if not reference.isfinite().all():  # a fault of the model or a picture, which the engine reports
            return True
        self.compared = True
        logits = NativeDecoder(decoder, cache, library, weights).logits(x, segments, [len(x) - 1])
        return bool((logits - reference).abs().max() <= _MAX_DIFFERENCE[weights] * reference.abs().max())

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._referenced.append(tensor)
        return tensor.data_ptr()

    def _linear(self, layer: Any) -> ctypes.Structure:
        """Return a linear layer, or an embedding used as one, as C reads it."""
        bias = getattr(layer, "bias", None)
        if isinstance(layer, PackedLinear | PackedEmbedding):
            self._referenced += [layer.data, bias]
            return packed_struct(layer.packed, bias)
        bias_address = None if bias is None else self._address(bias)
        return _Dense(*layer.weight.shape, self._address(layer.weight), bias_address)

    def _block(self, block: Any) -> ctypes.Structure:
        attention, mlp = block.attention, block.mlp
        norms = (block.attention_norm, block.mlp_norm, attention.q_norm, attention.k_norm)
        layers = (attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, mlp.down)
        struct: ctypes.Structure = self._block_type(
            *(self._address(part.weight) if isinstance(part, RMSNorm) else None for part in norms),
            *(self._linear(layer) for layer in layers),
        )
        return struct


def _int64_array(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def native_decoder(decoder: Decoder, cache: KVCache) -> NativeDecoder | None:
    """Return the decoder prepared for native code, or None if native code cannot run it.

    If the decoder was changed by hand, this is logged once, because answers are slower then.
    """
    weights = _supported_weights(decoder, cache)
    if weights is None:
        return None
    library, _ = compiled(weights)
    # Without OpenMP, native code uses one thread. PyTorch with several threads is faster then.
    if library is None or (torch.get_num_threads() > 1 and not library.pumice_threads()):
        return None
    return NativeDecoder(decoder, cache, library, weights)


def _edited(module: nn.Module, config: DecoderConfig) -> bool:
    """Return whether a module computes anything else than its class in `_MODULES`, as the config says."""
    if type(module) not in _MODULES or is_patched(type(module)):
        return True
    if isinstance(module, Decoder) and len(module.blocks) != config.depth:
        return True
    if isinstance(module, MLP) and module.activation is not F.silu:
        return True
    if isinstance(module, RMSNorm) and (module.eps, module.offset) != (config.norm_eps, 0.0):
        return True
    if isinstance(module, Attention) and module.q_factor is not None:
        return True
    hooks = (module._forward_hooks, module._forward_pre_hooks, *GLOBAL_HOOKS)
    return any(hooks) or bool(functions(module).keys() - {"activation"})


def _supported_weights(decoder: Decoder, cache: KVCache) -> Weights | None:
    """Return what weights the decoder has, or None if decode.c cannot run them or their sizes."""
    config = decoder.config
    if config.head_dim % LANES or config.width % LANES or CAPABILITY.unsupported(config):
        return None
    # 1. Layers of a training and other devices are left to PyTorch, edited or not.
    in_training = any(isinstance(module, LoraLinear | QuantizedLinear) for module in decoder.modules())
    tensors = [*decoder.parameters(), *decoder.buffers()]
    if in_training or any(tensor.device.type != "cpu" for tensor in [*tensors, cache.keys]):
        return None
    # 2. So are edited modules.
    edited = [name for name, module in decoder.named_modules() if _edited(module, config)]
    if edited:
        if decoder not in _TOLD:
            _LOG.warning(
                "the %s was edited or has hooks, so PyTorch computes all answers, more slowly",
                f"decoder's {edited[0]}" if edited[0] else "decoder",
            )
        _TOLD.add(decoder)
        return None
    # 3. All matrices are packed, or all are plain: not a mixture.
    leaves = [module for module in decoder.modules() if not list(module.children())]
    layers = [module for module in leaves if not isinstance(module, RMSNorm | nn.Identity)]
    if all(isinstance(module, PackedLinear | PackedEmbedding) for module in layers):
        weights: Weights = "packed"
    elif all(type(module) in (nn.Linear, nn.Embedding) for module in layers):
        if config.mlp_width % LANES or config.heads * config.head_dim % LANES or config.vocab_size % TILE:
            return None
        weights = "fp32"
    else:
        return None
    # 4. All tensors have the types that decode.c reads.
    cache_dtype = torch.bfloat16 if weights == "packed" else torch.float32
    floats_fit = all(t.dtype == torch.float32 for t in tensors if t.dtype != torch.uint8)
    return weights if floats_fit and cache.keys.dtype == cache_dtype else None
