"""What the engine and its adapters are doing, read whenever the metrics are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from adapters.errors import AdapterError
from adapters.registry import AdapterRegistry
from server.engine.async_engine import AsyncEngine, EngineState
from server.engine.engine import Engine
from server.engine.request import SequenceStatus
from server.metrics import Metrics

T = TypeVar("T")


def add_gauges(metrics: Metrics, async_engine: AsyncEngine, max_loras: int) -> None:
    """Everything that is not counted request by request."""

    def of_engine(value: Callable[[Engine], T], before: T) -> Callable[[], T]:
        """`before` the engine is ready there is nothing to read."""
        return lambda: value(async_engine.engine) if async_engine.state is EngineState.READY else before

    metrics.gauge("num_requests_running", "Sequences that run", lambda: async_engine.num_running)
    metrics.gauge("num_requests_waiting", "Sequences that wait", lambda: async_engine.num_waiting)
    metrics.gauge("kv_cache_usage_perc", "Share of KV-cache pages in use", of_engine(_cache_usage, 0.0))
    preemptions = of_engine(lambda e: e.scheduler.preemptions, 0)
    metrics.counter("num_preemptions", "Sequences whose pages were taken back", preemptions)
    metrics.gauge("adapters", "Adapters that are served", of_engine(lambda e: len(e.registry), 0))
    metrics.is_served = lambda name: of_engine(lambda e: _is_served(e.registry, name), True)()
    metrics.gauge("lora_slots", "Slots for adapters on the device", lambda: max_loras)
    metrics.gauge("lora_slots_used", "Slots that hold an adapter", of_engine(lambda e: e.registry.device.num_used, 0))
    metrics.gauge("lora_host_adapters", "Adapters in host memory", of_engine(lambda e: len(e.registry.host), 0))
    metrics.gauge("lora_host_bytes", "Host memory that they take", of_engine(lambda e: e.registry.host.num_bytes, 0))
    metrics.gauge("lora_device_bytes", "Bytes in slots", of_engine(lambda e: e.registry.device.num_bytes, 0))
    metrics.counter("lora_loads", "Adapters read from disk", of_engine(lambda e: e.registry.host.counts.loads, 0))
    again = of_engine(lambda e: _arena_loads(e.registry), 0)
    metrics.counter("lora_arena_loads", "Adapters read from arena files", again)
    failures = of_engine(lambda e: e.registry.host.counts.failures, 0)
    metrics.counter("lora_load_failures", "Adapters that could not be read", failures)
    nothing: dict[str, float] = {}
    evictions = of_engine(lambda e: _evictions(e.registry), nothing)
    metrics.counters("lora_evictions", "Adapters that made room, by tier", "tier", evictions)
    hits = of_engine(lambda e: dict[str, float](e.registry.hits), nothing)
    metrics.counters("lora_hits", "Requests by the tier in which they found their adapter", "tier", hits)
    graph_steps = of_engine(lambda e: dict[str, float](e.runner.graphs.steps) if e.runner.graphs else nothing, nothing)
    metrics.counters("cuda_graph_steps", "Steps run as a CUDA graph, or why not", "ran", graph_steps)
    metrics.info("lora_requests_info", "Adapters of the moment", lambda: _adapters_now(metrics, max_loras))
    metrics.info("cache_config_info", "The KV cache", of_engine(lambda e: (_cache(e), 1.0), None))


def _cache_usage(engine: Engine) -> float:
    blocks = engine.scheduler.blocks
    return 1 - blocks.num_free / blocks.num_blocks if blocks.num_blocks else 0.0


def _cache(engine: Engine) -> dict[str, str]:
    blocks = engine.scheduler.blocks
    dtype = str(engine.page_dtype).removeprefix("torch.")
    return {"block_size": str(blocks.block_size), "cache_dtype": dtype, "num_blocks": str(blocks.num_blocks)}


def _adapters_now(metrics: Metrics, max_loras: int) -> tuple[dict[str, str], float]:
    """Their names, and when. As vLLM names them, so that what routes requests by them works here too."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for sequence, label in metrics.live.items():
        if sequence.version is not None:
            names[sequence.status is SequenceStatus.RUNNING].add(label)
    labels = {
        "max_lora": str(max_loras),
        "running_lora_adapters": ",".join(sorted(names[True])),
        "waiting_lora_adapters": ",".join(sorted(names[False])),
    }
    return labels, time.time()


def _evictions(registry: AdapterRegistry) -> dict[str, float]:
    return {"host": registry.host.counts.evictions, "device": registry.device.evictions}


def _arena_loads(registry: AdapterRegistry) -> int:
    arenas = registry.host.arenas
    return 0 if arenas is None else arenas.reads


def _is_served(registry: AdapterRegistry, name: str) -> bool:
    try:
        registry.get(name)
    except AdapterError:
        return False
    return True
