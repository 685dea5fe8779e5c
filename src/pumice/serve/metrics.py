"""Counts and times in Prometheus's form, of one worker or, by shared files, of all of them.

prometheus_client decides when it is imported whether it counts for one process or for several; `run` sets
PROMETHEUS_MULTIPROC_DIR before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True)
class Levels:
    """Where a backend stands: the first four go up and down, the others only up."""

    running: int = 0
    waiting: int = 0
    cached_tokens: int = 0
    cache_capacity: int = 0
    prefix_hits: int = 0
    evictions: int = 0
    steps: int = 0


class Metrics:
    """What one server counts. `levels` tells where the backend stands when somebody looks."""

    def __init__(self, version: str, model: str) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, says: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"pumice_{name}", says, labels, registry=self.registry)

        def seconds(name: str, says: str, labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"pumice_{name}", says, labels, buckets=SECONDS, registry=self.registry)

        def gauge(name: str, says: str) -> Gauge:
            return Gauge(f"pumice_{name}", says, multiprocess_mode="livesum", registry=self.registry)

        self.requests = counter("requests", "Requests by path and status.", ["path", "status"])
        self.seconds = seconds("request_seconds", "From a request to the end of its answer.", ["path"])
        self.first = seconds("first_token_seconds", "From a request to its answer's first token.")
        self.prompt = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self.cached = counter("cached_prompt_tokens", "Those of them from the prefix cache.")
        self.generated = counter("generated_tokens", "Tokens of answers.")
        self.pictures = counter("pictures", "Pictures shown.")
        self.cancelled = counter("cancelled_requests", "Answers whose readers went away.")
        self._open = gauge("open_requests", "Requests that are being answered.")
        self._up = {
            "running": gauge("running_requests", "Requests that have a slot."),
            "waiting": gauge("waiting_requests", "Requests that wait for a slot."),
            "cached_tokens": gauge("cache_tokens", "Tokens that finished requests left in the cache."),
            "cache_capacity": gauge("cache_capacity_tokens", "Tokens that the KV cache holds."),
        }
        self._counts = {
            "prefix_hits": counter("prefix_hits", "Tokens of prompts that were not computed again."),
            "evictions": counter("cache_evictions", "Finished requests that had to make room."),
            "steps": counter("steps", "Steps of the engine."),
        }
        info = Gauge(
            "pumice_info",
            "The version and the model.",
            ["version", "model"],
            multiprocess_mode="max",
            registry=self.registry,
        )
        info.labels(version, model).set(1)
        self._before = Levels()
        self.levels: Callable[[], Levels] = Levels

    @property
    def shared(self) -> bool:
        """Whether several workers count together; then each must `refresh` without being asked."""
        return "PROMETHEUS_MULTIPROC_DIR" in os.environ

    def opened(self, change: int) -> None:
        self._open.inc(change)

    def refresh(self) -> None:
        """Take over where the backend stands."""
        now = self.levels()
        for name, gauge in self._up.items():
            gauge.set(getattr(now, name))
        for name, counter in self._counts.items():
            counter.inc(max(0, getattr(now, name) - getattr(self._before, name)))
        self._before = now

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        self.refresh()
        if not self.shared:
            return generate_latest(self.registry)
        everybody = CollectorRegistry()
        multiprocess.MultiProcessCollector(everybody)
        return generate_latest(everybody)
