"""Prometheus metrics of a server: requests as they are counted, and the engine's state when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from pumice.engine.stats import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST
GAUGES = {
    "running": ("running_requests", "Requests that have a slot."),
    "waiting": ("waiting_requests", "Requests that wait for a slot."),
    "cached_tokens": ("cache_tokens", "Tokens that finished requests left in the cache."),
    "cache_capacity": ("cache_capacity_tokens", "Tokens that the KV cache holds."),
}
COUNTERS = {
    "prefix_hits": ("prefix_hits", "Tokens of prompts that were not computed again."),
    "evictions": ("cache_evictions", "Finished requests that had to make room."),
    "steps": ("steps", "Steps of the engine."),
}


class Metrics:
    """The metrics of one server. stats: returns the state of its engine."""

    def __init__(self, version: str, model: str, stats: Callable[[], EngineStats]) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"pumice_{name}", help_text, labels, registry=registry)

        def seconds(name: str, help_text: str, labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"pumice_{name}", help_text, labels, buckets=SECONDS, registry=registry)

        self.requests = counter("requests", "Requests by path and status.", ["path", "status"])
        self.seconds = seconds("request_seconds", "From a request to the end of its answer.", ["path"])
        self.first_token = seconds("first_token_seconds", "From a request to its answer's first token.")
        self.prompt = counter("prompt_tokens", "Tokens of prompts that were answered.")
        self.cached = counter("cached_prompt_tokens", "Those of them from the prefix cache.")
        self.generated = counter("generated_tokens", "Tokens of answers.")
        self.images = counter("pictures", "Pictures shown.")
        self.cancelled = counter("cancelled_requests", "Answers whose readers went away.")
        self.open = Gauge("pumice_open_requests", "Requests that are being answered.", registry=registry)
        info = Gauge("pumice_info", "The version and the model.", ["version", "model"], registry=registry)
        info.labels(version, model).set(1)
        registry.register(_EngineCollector(stats))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field, (name, help_text) in GAUGES.items():
            yield GaugeMetricFamily(f"pumice_{name}", help_text, getattr(stats, field))
        for field, (name, help_text) in COUNTERS.items():
            yield CounterMetricFamily(f"pumice_{name}", help_text, getattr(stats, field))
