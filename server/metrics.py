"""Prometheus metrics under vLLM's names, with the prefix `multilora:`. One registry for each server object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PREFIX = "multilora:"
OTHER = "other"
TOKEN_KINDS = ("prompt", "generation")


class Metrics:
    """Counted by the service; the engine's gauges are read when somebody asks. Any thread."""

    def __init__(self, max_adapters: int = 64) -> None:
        """max_adapters: how many have series of their own."""
        self.registry = CollectorRegistry()
        self._max_adapters = max_adapters
        self._adapters: set[str] = set()
        self.is_served: Callable[[str], bool] = lambda _: True
        """Whether an adapter of this name is still there."""
        self.adapter_requests = Counter(
            PREFIX + "adapter_requests", "Sequences accepted, by adapter", ["adapter"], registry=self.registry
        )
        self.adapter_tokens = Counter(
            PREFIX + "adapter_tokens", "Tokens, by adapter and kind", ["adapter", "kind"], registry=self.registry
        )
        self.load_seconds = self._histogram("lora_load_seconds", "From disk to host memory")
        self.prompt_tokens = Counter(
            PREFIX + "prompt_tokens", "Prompt tokens of accepted requests", registry=self.registry
        )
        self.generation_tokens = Counter(PREFIX + "generation_tokens", "Tokens generated", registry=self.registry)
        self.sequences = Counter(
            PREFIX + "request_success", "Sequences that ended", ["task", "finished_reason"], registry=self.registry
        )
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "From acceptance to the first token")
        self.latency = self._histogram("e2e_request_latency_seconds", "From acceptance to the end, by task", ["task"])

    def adapter(self, name: str) -> str:
        """The label for this adapter: its name while there is room for one more, else `other`."""
        if name in self._adapters:
            return name
        if len(self._adapters) >= self._max_adapters:
            self._forget_removed()
        if len(self._adapters) >= self._max_adapters:
            return OTHER
        self._adapters.add(name)
        return name

    def count_prompt(self, label: str, tokens: int) -> None:
        """One more sequence of the adapter with this label."""
        self.prompt_tokens.inc(tokens)
        self.adapter_requests.labels(label).inc()
        self.adapter_tokens.labels(label, "prompt").inc(tokens)
        self.adapter_tokens.labels(label, "generation").inc(0)

    def _histogram(self, name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=LATENCY_BUCKETS_S, registry=self.registry)

    def _forget_removed(self) -> None:
        """The series of adapters that are gone end, and others may have their places."""
        for name in [name for name in self._adapters if not self.is_served(name)]:
            self._adapters.discard(name)
            self.adapter_requests.remove(name)
            for kind in TOKEN_KINDS:
                self.adapter_tokens.remove(name, kind)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read at each scrape."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(read)

    def counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that only grows, read at each scrape."""
        self.registry.register(_ReadCounter(PREFIX + name, text, "", lambda: {"": read()}))

    def counters(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        """Values that only grow, by a label of few values, read at each scrape."""
        self.registry.register(_ReadCounter(PREFIX + name, text, label, read))

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)


class _ReadCounter(Collector):
    """A counter that somebody else keeps."""

    def __init__(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, float]]) -> None:
        self._name = name
        self._text = text
        self._labels = [label] if label else []
        self._read = read

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for value, count in self._read().items():
            family.add_metric([value] if self._labels else [], count)
        yield family
