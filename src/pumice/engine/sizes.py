"""Choose the size of the KV cache from the memory that is free."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from pumice.errors import InputError
from pumice.model.cache import KVCache
from pumice.model.llava import Llava
from pumice.storage.memory import GB, available_memory, free_on

# Of an engine for one user; more if one context needs more, and at most half of the free memory.
CACHE_BYTES = 1 << 30
FREE_SHARE = 0.5
# A block that was never used gets memory only while this much is free: activations need some, too.
RESERVE = 256 * 2**20
LEAST_TOKENS = 256  # of a GPU's cache: a short question and its answer
# Prompt tokens of a step, which reads all weights. On a CPU, LLaVA-1.5's 576 image tokens and a question fit.
# A GPU needs more rows to be busy, and has no one waiting for a shorter step.
CHUNK = {"cpu": 640, "cuda": 2048}
_STATUS = Path("/proc/self/status")
_LOG = logging.getLogger("pumice")


def check_sizes(slots: int, cache_tokens: int | None, chunk: int | None) -> None:
    """Raise InputError unless an engine can have these sizes."""
    for name, value in (("slots", slots), ("chunk", chunk), ("cache_tokens", cache_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; give 1 or more")


def chunk_size(device: torch.device) -> int:
    """Return how many prompt tokens one step computes on a device."""
    return CHUNK.get(device.type, CHUNK["cpu"])


def free_memory(model: Llava) -> float | None:
    """Return the bytes that are free beside the model's weights on its device; None if unknown."""
    free = free_on(model.device)
    return None if free is None else max(0.0, free - mapped_bytes(model))


def mapped_bytes(model: Llava) -> float:
    """Return the bytes of weights that are mapped from files. The system counts their pages as free memory.

    Only a CPU computes with such weights. It is right before the model answers: later this process has other
    memory of its own.
    """
    if model.device.type != "cpu":
        return 0.0
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")
    return max(0.0, weights - _own_memory(weights))


def _own_memory(default: float) -> float:
    """Return the bytes of this process that no file holds; `default` where the system does not say."""
    if not _STATUS.exists():
        return default
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024.0 if "RssAnon" in lines else default


def cache_size(model: Llava, slots: int, cache_tokens: int | None, memory_share: float | None) -> int:
    """Return the number of tokens of the KV cache.

    cache_tokens, memory_share: as in `Engine`. Raise InputError if `cache_tokens` need more memory than is
    free. What is chosen is logged, as a warning if it limits the context.
    """
    config = model.config.decoder
    token_bytes = KVCache.bytes_per_token(config, model.decoder.cache_dtype)
    free = free_memory(model)
    if cache_tokens is not None:
        if free is not None and cache_tokens * token_bytes > free:
            raise InputError(
                f"a KV cache of {cache_tokens} tokens takes {cache_tokens * token_bytes / GB:.1f} GB and "
                f"{free / GB:.1f} GB of memory are free; give at most {int(free // token_bytes)} tokens"
            )
        return cache_tokens
    # 1. What can be used: all slots at their longest, twice if finished requests are to stay beside them.
    if memory_share is None:
        tokens = 2 * slots * config.context
        # A CPU's memory is shared with other programs; a GPU's is there for the model.
        if model.device.type != "cuda":
            tokens = max(config.context, min(CACHE_BYTES // token_bytes, tokens))
        memory_share = FREE_SHARE
    else:
        tokens = slots * config.context
    # 2. What there is memory for. A cache holds a token at least; what does not fit is refused later. A GPU
    #    gives the memory now, so that a cache too small for any question is refused now.
    if free is not None:
        tokens = max(1, min(tokens, int(memory_share * free // token_bytes)))
        if model.device.type == "cuda" and tokens < min(LEAST_TOKENS, config.context):
            raise InputError(
                f"{free / GB:.2f} GB of {model.device} are free beside the weights, which is a KV cache of "
                f"{tokens} tokens, fewer than {min(LEAST_TOKENS, config.context)}; close other programs, or "
                "quantise the model"
            )
    size = f"the KV cache holds {tokens} tokens in {tokens * token_bytes / GB:.2f} GB"
    if tokens < config.context and free is not None:
        _LOG.warning(
            "%s, fewer than the model's context of %d: %.1f GB of memory are free",
            size, config.context, free / GB,
        )  # fmt: skip
    else:
        _LOG.info("%s", size)
    return tokens


def has_memory(device: torch.device, mapped: float = 0.0) -> bool:
    """Return whether the system can give memory to more of a KV cache. On a GPU it was taken at the start.

    mapped: bytes of weights, as `mapped_bytes` counts them. Their pages are no room: each token reads them.
    """
    if device.type != "cpu":
        return True
    free = available_memory()
    return free is None or free - mapped > RESERVE
