"""Tally: what one sequence took, told to the metrics and to its request's context. Event loop only."""

from __future__ import annotations

import time

from server.context import RequestContext
from server.engine.request import Sequence
from server.metrics import Metrics


class Tally:
    """Of one sequence, from its acceptance to its end."""

    def __init__(self, metrics: Metrics, context: RequestContext, sequence: Sequence, label: str) -> None:
        """label: of the adapter, for its metrics."""
        self.num_tokens = 0
        self._metrics = metrics
        self._context = context
        self._sequence = sequence
        self._label = label
        self._started = self._last = time.monotonic()
        self._first: float | None = None
        self._generated = metrics.adapter_tokens.labels(label, "generation")
        context.sequences += 1
        context.prompt_tokens += len(sequence.given)
        metrics.begin(sequence, label)

    def token(self) -> None:
        """One was generated."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._started)
            self._context.first_token_s = self._context.first_token_s or now - self._context.started
        else:
            self._metrics.inter_token_latency.observe(now - self._last)
        self._last = now
        self.num_tokens += 1
        self._context.completion_tokens += 1
        self._metrics.generation_tokens.inc()
        self._generated.inc()

    def end(self, reason: str) -> None:
        """The sequence ended, for `reason`: a finish reason, `abort` or `error`."""
        now, admitted, metrics, task = time.monotonic(), self._sequence.admitted_at, self._metrics, self._sequence.task
        metrics.end(self._sequence)
        metrics.sequences.labels(task, reason).inc()
        metrics.latency.labels(task).observe(now - self._started)
        metrics.request_prompt_tokens.observe(len(self._sequence.given))
        waited = (admitted or now) - self._started
        metrics.queue_time.observe(waited)
        self._context.queue_s = max(self._context.queue_s or 0.0, waited)
        if admitted is not None:
            metrics.inference_time.observe(now - admitted)
        if self._sequence.generates:
            metrics.request_generation_tokens.observe(self.num_tokens)
        if self._first is not None and admitted is not None:
            metrics.prefill_time.observe(self._first - admitted)
            metrics.decode_time.observe(now - self._first)
            if self.num_tokens > 1:
                metrics.time_per_output_token.observe((self._last - self._first) / (self.num_tokens - 1))
