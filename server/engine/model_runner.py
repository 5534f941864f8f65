"""ModelRunner: Batch -> tensors -> one forward pass -> a token or a task's values for each sequence.

Knows nothing of scheduling, text or HTTP. Model architectures are transformers' own; nothing here names one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adapters.batch import LoraBatch, LoraScope
from adapters.heads import apply_heads
from adapters.kernels.library import Library
from adapters.slots import LoraSlots
from server.engine.attention import Span
from server.engine.base_model import BaseModel
from server.engine.decode_graphs import GRAPH, DecodeGraphs
from server.engine.device import to_device
from server.engine.kv_cache import KVCache
from server.engine.padded import forward_padded
from server.engine.request import (
    FEATURE_EXTRACTION,
    NOT_FINITE,
    SEQ_CLS,
    TOKEN_CLS,
    Batch,
    RowResult,
    ScheduledSequence,
)
from server.engine.scoring import to_score
from server.engine.task_heads import TaskHead
from server.engine.two_stacks import TwoStacks
from server.engine.vocabularies import sample_by_vocabulary, score_by_vocabulary


class ModelRunner:
    """Runs batches on one patched base model. Engine's thread only."""

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        base: BaseModel,
        slots: LoraSlots,
        scope: LoraScope,
        cache: KVCache,
        block_size: int,
        library: Library | None,
    ) -> None:
        """library: the CPU kernels, where they draw tokens."""
        self.base = base
        self.library = library
        self.block_size = block_size
        self.slots = slots
        self.scope = scope
        self.cache = cache
        self.padded = False
        """Whether sequences are computed a row each, not packed: see padded.py."""
        self.two_stacks: TwoStacks | None = None
        """Runs an encoder-decoder."""
        self.graphs: DecodeGraphs | None = None
        """Runs the steps that were captured."""
        self.heads: Mapping[str, TaskHead] = {}
        """By task; where there is none, a head is its last layer alone."""

    @property
    def form(self) -> str:
        """Of its forward pass, for messages."""
        return "padded" if self.padded else "packed"

    @property
    def num_logits(self) -> int | None:
        """Of a row without an adapter; None: of every row."""
        output = self.base.layout.output
        return None if output is None else output.shape.d_out

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[int, RowResult]:
        """Results by sequence id, for every item that completes, and where a prompt is scored."""
        self.cache.clear(batch.fresh_pages)
        spans = _spans(batch.items)
        ends = [span.end for span in spans]
        generating = [i for i, item in enumerate(batch.items) if item.completes and item.sequence.generates]
        scored = to_score(batch.items, spans)
        rows = [ends[i] - 1 for i in generating] + [row for each in scored for row in each.rows]
        hidden, logits = self.forward(batch, spans, rows)
        results: dict[int, RowResult] = {}
        if logits is not None:
            scores = score_by_vocabulary(logits[len(generating) :], scored, self.num_logits)
            results |= {id: RowResult(prompt_logprobs=entries) for id, entries in scores.items()}
            sequences = [batch.items[i].sequence for i in generating]
            sampled = sample_by_vocabulary(logits[: len(generating)], sequences, self.num_logits, self.library)
            for sequence, result in zip(sequences, sampled, strict=True):
                entries = scores.get(sequence.id)
                results[sequence.id] = replace(result, prompt_logprobs=entries) if entries else result
        for task, values_of in (
            (SEQ_CLS, self._classify),
            (TOKEN_CLS, self._tag),
            (FEATURE_EXTRACTION, self._embed),
        ):
            own = [(it, sp) for it, sp in zip(batch.items, spans, strict=True) if it.sequence.task == task]
            if own:
                values = values_of(hidden, [item for item, _ in own], [span for _, span in own])
                for (item, _), value in zip(own, to_host(values), strict=True):
                    good = bool(np.isfinite(value).all())
                    results[item.sequence.id] = RowResult(values=value) if good else RowResult(error=NOT_FINITE)
        return results

    def forward(
        self, batch: Batch, spans: SequenceOf[Span], logit_rows: SequenceOf[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T, hidden_size] of the packed row, and logits [len(logit_rows), vocabulary] in fp32."""
        self.slots.ready()
        if self.graphs is not None:
            why_eager = self.graphs.why_eager(batch)
            self.graphs.steps[why_eager or GRAPH] += 1
            if why_eager is None:
                return self.graphs.run(batch, spans)
        if self.padded:
            return forward_padded(self.base, self.scope, batch.items), None
        if self.two_stacks is not None:
            return self.two_stacks.forward(batch.items, spans, logit_rows)
        device = self.base.device
        token_ids = [t for item in batch.items for t in item.sequence.tokens(item.start, item.start + item.count)]
        positions = [
            place
            for item in batch.items
            for place in self.base.positions.of(item.sequence.tokens, item.start, item.start + item.count)
        ]
        slots = [item.slot for item in batch.items for _ in range(item.count)]
        ids, places, rows = to_device(device, [[token_ids], [positions], logit_rows])
        with ExitStack() as scopes:
            lora = LoraBatch.of_slots(slots)
            scopes.enter_context(self.scope.use(lora.with_logits([slots[row] for row in logit_rows])))
            scopes.enter_context(self.cache.use(spans, device))
            return self.base.forward(ids, places, rows if logit_rows else None)

    def _classify(self, hidden: Tensor, items: SequenceOf[ScheduledSequence], spans: SequenceOf[Span]) -> list[Tensor]:
        """The sequence's representative token (the first, pooled, where the base attends both ways), its head."""
        slots = [item.slot for item in items]
        if self.base.causal:
            places = [span.start + self._last(item) for item, span in zip(items, spans, strict=True)]
        else:
            places = [span.start for span in spans]
        rows = hidden.index_select(0, *to_device(hidden.device, [places]))
        return apply_heads(self.slots, self._features(SEQ_CLS, rows, slots), slots)

    def _last(self, item: ScheduledSequence) -> int:
        """Place of the last token that is no padding, as transformers' classifiers choose it."""
        ids, pad = item.sequence.prompt_ids, self.base.pad_id
        if pad is None:
            return len(ids) - 1
        return max((place for place, token in enumerate(ids) if token != pad), default=0)

    def pool(self, rows: Tensor, slots: SequenceOf[int]) -> Tensor:
        """The base's pooler (dense and tanh over the first token), with each row's adapter on it."""
        pooler: nn.Module | None = self.base.pooler
        if pooler is None:
            return rows
        with self.scope.use(LoraBatch.of_slots(slots)):
            pooled: Tensor = pooler(rows[:, None])
        return pooled

    def _features(self, task: str, rows: Tensor, slots: SequenceOf[int]) -> Tensor:
        """What the last layer of each row's head reads of hidden states, [n, hidden_size]."""
        head = self.heads.get(task)
        if head is None:
            return rows
        features = self.pool(rows, slots).float() if head.uses_pooler else rows.float().clone()
        start = 0
        for slot, run in groupby(slots):
            end = start + sum(1 for _ in run)
            own = self.slots.heads[slot]
            if own is not None and own.inner:
                features[start:end] = head.features(own.inner, rows[start:end])
            start = end
        return features

    def _tag(self, hidden: Tensor, items: SequenceOf[ScheduledSequence], spans: SequenceOf[Span]) -> list[Tensor]:
        """Every token through its adapter's head: [tokens, num_labels] for each sequence."""
        results = []
        for item, span in zip(items, spans, strict=True):
            slots = [item.slot] * item.count
            rows = self._features(TOKEN_CLS, hidden[span.start : span.end], slots)
            results.append(torch.stack(apply_heads(self.slots, rows, slots)))
        return results

    def _embed(self, hidden: Tensor, items: SequenceOf[ScheduledSequence], spans: SequenceOf[Span]) -> list[Tensor]:
        """The base's pooling, normalised to length 1."""
        del items
        pooled = []
        for span in spans:
            rows = hidden[span.start : span.end].float()
            chosen = {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}[self.base.pooling]
            pooled.append(nn.functional.normalize(chosen, dim=0))
        return pooled


def to_host(values: SequenceOf[Tensor]) -> list[NDArray[np.float32]]:
    """Tensors of any shapes as fp32 arrays, by one copy: the only place where a task waits for the device."""
    flat = torch.cat([value.float().flatten() for value in values]).cpu().numpy()
    ends = np.cumsum([value.numel() for value in values])
    return [part.reshape(value.shape) for part, value in zip(np.split(flat, ends[:-1]), values, strict=True)]


def _spans(items: SequenceOf[ScheduledSequence]) -> list[Span]:
    spans = []
    start = 0
    for item in items:
        end = start + item.count
        pages = item.sequence.pages if item.sequence.generates else None
        spans.append(Span(start, end, item.start, pages))
        start = end
    return spans
