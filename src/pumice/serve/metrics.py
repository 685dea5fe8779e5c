"""Prometheus metrics of one worker, or of all workers together through shared files.

prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is imported. `run` sets it before that for several
workers.
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
class BackendStats:
    """State of a backend. The first four numbers go up and down, the others only grow."""

    running: int = 0
    waiting: int = 0
    cached_tokens: int = 0
    cache_capacity: int = 0
    prefix_hits: int = 0
    evictions: int = 0
    steps: int = 0


class Metrics:
    """The metrics of one server. `stats` returns the state of the backend when the metrics are read."""

    def __init__(self, version: str, model: str) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"pumice_{name}", help_text, labels, registry=self.registry)

        def seconds(name: str, help_text: str, labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"pumice_{name}", help_text, labels, buckets=SECONDS, registry=self.registry)

        def gauge(name: str, help_text: str) -> Gauge:
            return Gauge(f"pumice_{name}", help_text, multiprocess_mode="livesum", registry=self.registry)

        self.requests = counter("requests", "Requests by path and status.", ["path", "status"])
        self.seconds = seconds("request_seconds", "From a request to the end of its answer.", ["path"])
        self.first_token = seconds("first_token_seconds", "From a request to its answer's first token.")
        self.prompt = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self.cached = counter("cached_prompt_tokens", "Those of them from the prefix cache.")
        self.generated = counter("generated_tokens", "Tokens of answers.")
        self.images = counter("pictures", "Pictures shown.")
        self.cancelled = counter("cancelled_requests", "Answers whose readers went away.")
        self._open = gauge("open_requests", "Requests that are being answered.")
        self._gauges = {
            "running": gauge("running_requests", "Requests that have a slot."),
            "waiting": gauge("waiting_requests", "Requests that wait for a slot."),
            "cached_tokens": gauge("cache_tokens", "Tokens that finished requests left in the cache."),
            "cache_capacity": gauge("cache_capacity_tokens", "Tokens that the KV cache holds."),
        }
        self._counters = {
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
        self._last_stats = BackendStats()
        self.stats: Callable[[], BackendStats] = BackendStats

    @property
    def shared(self) -> bool:
        """Whether several workers count together. Then each worker must call `refresh` regularly."""
        return "PROMETHEUS_MULTIPROC_DIR" in os.environ

    def add_open(self, change: int) -> None:
        """Add 1 when a request begins, and -1 when it ends."""
        self._open.inc(change)

    def refresh(self) -> None:
        """Copy the state of the backend into the metrics."""
        now = self.stats()
        for name, gauge in self._gauges.items():
            gauge.set(getattr(now, name))
        for name, counter in self._counters.items():
            counter.inc(max(0, getattr(now, name) - getattr(self._last_stats, name)))
        self._last_stats = now

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        self.refresh()
        if not self.shared:
            return generate_latest(self.registry)
        all_workers = CollectorRegistry()
        multiprocess.MultiProcessCollector(all_workers)
        return generate_latest(all_workers)
