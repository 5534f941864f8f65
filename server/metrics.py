"""Prometheus metrics under vLLM's names, with the prefix `multilora:`. One registry for each server object."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PREFIX = "multilora:"


class Metrics:
    """Counted by the service; the engine's gauges are read when somebody asks. Any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = Counter(
            PREFIX + "prompt_tokens", "Prompt tokens of accepted requests", registry=self.registry
        )
        self.generation_tokens = Counter(PREFIX + "generation_tokens", "Tokens generated", registry=self.registry)
        self.sequences = Counter(
            PREFIX + "request_success", "Sequences that ended", ["task", "finished_reason"], registry=self.registry
        )
        self.time_to_first_token = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From acceptance to the first token",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.latency = Histogram(
            PREFIX + "e2e_request_latency_seconds",
            "From acceptance to the end, by task",
            ["task"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read at each scrape."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(read)

    def counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that only grows, read at each scrape."""
        self.registry.register(_ReadCounter(PREFIX + name, text, read))

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)


class _ReadCounter(Collector):
    """A counter that somebody else keeps."""

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name = name
        self._text = text
        self._read = read

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())
