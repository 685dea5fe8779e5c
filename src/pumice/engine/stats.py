"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it has done since it was created.

    Each hypothesis of a beam search runs or waits as a request.
    """

    running: int
    waiting: int
    slots: int  # requests that can run at a time; each has one slot of the KV cache
    cached_tokens: int  # of finished requests, ready to be reused
    cache_capacity: int  # tokens
    prompt_tokens: int  # of all requests that have started
    generated_tokens: int
    prefix_hits: int  # of `prompt_tokens`, those found in the prefix cache
    evictions: int  # blocks evicted from the prefix cache
    steps: int
