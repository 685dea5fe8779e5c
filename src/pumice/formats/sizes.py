"""Say how much memory a model takes before any of its tensors is read."""

from __future__ import annotations

import dataclasses
import math

import torch

from pumice.errors import InputError
from pumice.formats.peft.read import merge_adapters
from pumice.formats.quantize import can_quantize, kept_below, quantize_state
from pumice.kernels.packed import BlockFormat, packed_size
from pumice.model.cache import KVCache
from pumice.model.llava import Llava
from pumice.model.quantized import KINDS
from pumice.model.quantized_vision import quantized_shapes
from pumice.model.vision import WideningLinear
from pumice.storage.memory import GB, free_on
from pumice.storage.parts import LoadedParts

PROCESS_BYTES = 350e6  # Python, PyTorch and the buffers of a step, measured on a CPU
SHORT_PROMPT = 1024  # tokens: a picture of LLaVA-1.5, a question and its answer
PARTS = {"tower": "tower", "connector": "connector", "decoder": "language model"}


def weight_sizes(
    loaded: LoadedParts,
    quantize: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    with_mapped: bool = True,
) -> dict[str, int]:
    """Return the bytes of each part's weights in memory, as `open_model` would hold them, by part.

    quantize: "int8", "int4" or None. dtype: of a decoder that is not quantised. with_mapped: count weights
    that are mapped from their file, whose memory the system can take back.
    """
    config = loaded.config
    if quantize is None:
        _, state = merge_adapters(config, loaded.state)
    else:
        state = quantize_state(config, loaded.state, quantize)
    with torch.device("meta"):
        model = Llava(dataclasses.replace(config, lora=None))
    widening = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, WideningLinear)}
    quantized = quantized_shapes(model.tower) if quantize is not None and device.type == "cpu" else {}
    sizes = dict.fromkeys(PARTS.values(), 0)
    for name, tensor in state.items():
        part = PARTS.get(name.split(".")[0], "connector")
        if tensor.blocks is not None and quantize is not None:
            if with_mapped or not tensor.blocks.mapped:
                sizes[part] += packed_size(tensor.blocks.kind, *tensor.shape)
            continue
        if name.startswith("tower.") and (shape := quantized.get(name.removeprefix("tower."))):
            sizes[part] += packed_size(BlockFormat.Q8_0, *shape)
            continue
        # As `open_model` loads them: on a CPU the tower stays in 16 bits where it is stored so, and computes
        # in fp32; so does what is not quantised of the decoder.
        held = dtype if device.type != "cpu" or (part == "language model" and not quantize) else torch.float32
        if name in widening and device.type == "cpu" and tensor.dtype.itemsize == 2:
            held = tensor.dtype
        sizes[part] += math.prod(tensor.shape) * held.itemsize
    return sizes


def cache_dtype(quantize: str | None, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the KV cache of a model that is opened so."""
    return torch.bfloat16 if quantize is not None and device.type == "cpu" else dtype


def least_memory(
    loaded: LoadedParts,
    quantize: str | None,
    device: torch.device,
    dtype: torch.dtype,
    cache_tokens: int | None = None,
) -> float:
    """Return the bytes with which a short question about a picture can be answered.

    cache_tokens: as in `check_memory`.
    """
    config = loaded.config.decoder
    tokens = min(SHORT_PROMPT, config.context)
    if cache_tokens is not None and device.type == "cuda":
        tokens = cache_tokens
    cache = tokens * KVCache.bytes_per_token(config, cache_dtype(quantize, device, dtype))
    process = PROCESS_BYTES if device.type == "cpu" else 0
    # Only a CPU computes with the pages of a file.
    weights = weight_sizes(loaded, quantize, device, dtype, with_mapped=device.type != "cpu")
    return sum(weights.values()) + cache + process


def check_memory(
    loaded: LoadedParts,
    label: str,
    quantize: str | None,
    device: torch.device,
    dtype: torch.dtype,
    cache_tokens: int | None = None,
) -> None:
    """Raise InputError if the model cannot be opened in the memory that is free; it names what could.

    cache_tokens: of a KV cache whose size is given. A GPU's memory for it is taken at the start.
    """
    free = free_on(device)
    needed = least_memory(loaded, quantize, device, dtype, cache_tokens)
    if free is None or needed <= free:
        return
    smaller = [
        (kind, size)
        for kind in KINDS
        if kind != quantize and can_quantize(loaded.config.decoder)
        if (size := least_memory(loaded, kind, device, dtype, cache_tokens)) <= free
    ]
    remedy = "close other programs, or use a smaller model"
    if smaller:
        remedy = "use " + " or ".join(f"--quantize {kind}, which needs {_gb(size)}" for kind, size in smaller)
    kind = "without quantisation" if quantize is None else f"in {quantize}"
    if quantize is not None and kept_below(loaded.config, loaded.state, quantize):
        kind = "as it is stored"
    if cache_tokens is not None and device.type == "cuda":
        kind, remedy = f"{kind} with a KV cache of {cache_tokens} tokens", f"give fewer tokens, {remedy}"
    raise InputError(f"'{label}' {kind} needs {_gb(needed)} and {_gb(free)} of memory are free; {remedy}")


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"
