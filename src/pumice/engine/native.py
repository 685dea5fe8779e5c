"""The next token of several sequences in one call of compiled code (`native.c`), where that can be had.

Knows an int8 decoder's tensors and the C compiler of this machine. The code is compiled once per machine,
when an engine with int8 weights first opens on a CPU, and kept in the cache folder. Without a compiler, for
other weights and devices, and with PUMICE_NATIVE=off, PyTorch's operations serve: the same, more slowly.

Shapes: R rows (one new token of a sequence each), D width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice.files import cache_folder
from pumice.model.cache import KVCache, Segment
from pumice.model.decoder import Decoder
from pumice.model.layers import RMSNorm, frequencies
from pumice.model.quantized import Int8Linear

LANES, TILE = 16, 4  # as in native.c: inputs are whole LANES, outputs whole TILEs
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# OpenMP, where there is one, is the library that PyTorch has loaded: it goes by the same name.
_TRIED = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
_LOG = logging.getLogger("pumice")


class _Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "depth",
                "width",
                "heads",
                "kv_heads",
                "head_width",
                "mlp_width",
                "vocabulary",
                "places",
            )
        ),
        ("window", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("turning", "blocks", "norm")),
        ("head", _Linear),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class NativeDecoder:
    """A decoder and its cache as `native.c` reads them, in place."""

    def __init__(self, decoder: Decoder, cache: KVCache, code: ctypes.CDLL) -> None:
        config = decoder.config
        self._decode = code.pumice_decode
        self._kept: list[Any] = []  # what C has addresses of
        self._vocabulary = config.vocab_size
        blocks = (_Block * config.depth)(*(self._block(block) for block in decoder.blocks))
        self._kept.append(blocks)
        turning = frequencies(config.head_width, config.rope_base, config.rope_scaling, cache.keys.device)
        self._model = _Model(
            config.depth, config.width, config.heads, config.kv_heads, config.head_width, config.mlp_width,
            config.vocab_size, cache.places, cache.window or 0, config.norm_eps,
            self._address(turning), ctypes.addressof(blocks), self._address(decoder.norm.weight),
            self._linear(decoder.head), self._address(cache.keys), self._address(cache.values),
        )  # fmt: skip

    def logits(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """The new token of each segment, embedded: x (R, D) -> logits (R, V) in fp32."""
        x = x.to(torch.float32, copy=True).contiguous()
        past = (ctypes.c_int64 * len(x))(*(segment.past for segment in segments))
        starts = (ctypes.c_int64 * len(x))(*(segment.start for segment in segments))
        logits = torch.empty(len(x), self._vocabulary)
        failed = self._decode(
            ctypes.byref(self._model), ctypes.c_int64(len(x)), ctypes.c_void_p(x.data_ptr()), past, starts,
            ctypes.c_void_p(logits.data_ptr()), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"a step of {len(x)} sequences found no memory")
        return logits

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, layer: Any) -> _Linear:
        bias = None if layer.bias is None else self._address(layer.bias)
        return _Linear(self._address(layer.weight), self._address(layer.scale), bias)

    def _block(self, block: Any) -> _Block:
        attention, mlp = block.attention, block.mlp
        norms = (block.attention_norm, block.mlp_norm, attention.q_norm, attention.k_norm)
        return _Block(
            *(self._address(part.weight) if isinstance(part, RMSNorm) else None for part in norms),
            *(self._linear(layer) for layer in (attention.qkv, attention.o, mlp.gate_up, mlp.down)),
        )


def native_decoder(decoder: Decoder, cache: KVCache) -> NativeDecoder | None:
    """The decoder for compiled code, or None where that does not serve."""
    if not _fits(decoder, cache):
        return None
    code = compiled()
    return None if code is None else NativeDecoder(decoder, cache, code)


def _fits(decoder: Decoder, cache: KVCache) -> bool:
    config = decoder.config
    sizes = (config.width, config.heads * config.head_width, config.mlp_width, config.head_width)
    parts = [module for block in decoder.blocks for module in block.modules() if not list(module.children())]
    kinds = (Int8Linear, RMSNorm, nn.Identity)
    return (
        cache.keys.device.type == "cpu"
        and cache.keys.dtype == torch.bfloat16
        and all(size % LANES == 0 for size in sizes)
        and config.vocab_size % TILE == 0
        and isinstance(decoder.head, Int8Linear)
        and all(isinstance(part, kinds) for part in parts)
        and all(part.scale.dtype == torch.bfloat16 for part in parts if isinstance(part, Int8Linear))
    )


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """The compiled code, from the cache folder or made now; None where there is no compiler that can."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("PUMICE_NATIVE") == "off" or compiler is None or sys.platform == "win32":
        return None
    source = Path(__file__).with_name("native.c")
    # A home folder may be shared by machines, and what is made for one processor may not run on another.
    known = [source.read_text(encoding="utf-8"), compiler, *_FLAGS, platform.machine(), _processor()]
    name = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    made = cache_folder() / "native" / f"{name}.so"
    try:
        if not made.exists():
            _compile(compiler, source, made)
        return ctypes.CDLL(str(made))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.info("decoding without compiled code: %s", error)
        return None


def _compile(compiler: str, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *_FLAGS, str(source), "-o", str(made), "-lm"]
        for extra in _TRIED:
            done = subprocess.run(
                [*command, *extra], capture_output=True, text=True, timeout=120, check=False
            )
            if done.returncode == 0:
                made.replace(target)
                return
    raise OSError(f"{compiler} failed: {done.stderr.strip()[-300:]}")


def _processor() -> str:
    """What tells this processor's abilities from another's."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        return platform.processor()
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
