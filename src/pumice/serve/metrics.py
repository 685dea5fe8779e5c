"""Counts and times in Prometheus's form, of one worker or, by shared files, of all of them.

prometheus_client decides when it is imported whether it counts for one process or for several; `run` sets
PROMETHEUS_MULTIPROC_DIR before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
        kept = {"registry": self.registry}
        self.requests = Counter("pumice_requests", "Requests by path and status.", ["path", "status"], **kept)
        self.seconds = Histogram(
            "pumice_request_seconds", "From a request's arrival to the end of its answer.", ["path"],
            buckets=SECONDS, **kept,
        )  # fmt: skip
        self.first = Histogram(
            "pumice_first_token_seconds", "From a request's arrival to its answer's first text.",
            buckets=SECONDS, **kept,
        )  # fmt: skip
        self.prompt = Counter("pumice_prompt_tokens", "Tokens of prompts that were answered.", **kept)
        self.cached = Counter("pumice_cached_prompt_tokens", "Those of them from the prefix cache.", **kept)
        self.generated = Counter("pumice_generated_tokens", "Tokens of answers.", **kept)
        self.pictures = Counter("pumice_pictures", "Pictures shown.", **kept)
        self.cancelled = Counter("pumice_cancelled_requests", "Answers whose readers went away.", **kept)
        gauges = {"multiprocess_mode": "livesum", **kept}
        self._open = Gauge("pumice_open_requests", "Requests that are being answered.", **gauges)
        self._up = {
            "running": Gauge("pumice_running_requests", "Requests that have a slot.", **gauges),
            "waiting": Gauge("pumice_waiting_requests", "Requests that wait for a slot.", **gauges),
            "cached_tokens": Gauge("pumice_cache_tokens", "Tokens in the KV cache.", **gauges),
            "cache_capacity": Gauge("pumice_cache_capacity_tokens", "Tokens that it can hold.", **gauges),
        }
        self._counts = {
            "prefix_hits": Counter("pumice_prefix_hits", "Prompts that began with a cached prefix.", **kept),
            "evictions": Counter("pumice_cache_evictions", "Cached prefixes that made room.", **kept),
            "steps": Counter("pumice_steps", "Steps of the engine.", **kept),
        }
        info = Gauge(
            "pumice_info", "The version and the model.", ["version", "model"],
            multiprocess_mode="max", registry=self.registry,
        )  # fmt: skip
        info.labels(version, model).set(1)
        self._before = Levels()
        self.levels: Callable[[], Levels] = Levels

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
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        everybody = CollectorRegistry()
        multiprocess.MultiProcessCollector(everybody)
        return generate_latest(everybody)
