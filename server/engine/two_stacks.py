"""The forward pass of an encoder-decoder: new sources through the encoder, then all targets through the decoder.

Knows nothing of scheduling or text. Each source is encoded once; what the decoder reads of it stays in its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from adapters.batch import LoraBatch, LoraScope
from server.engine.attention import Span
from server.engine.base_model import BaseModel
from server.engine.cross_attention import Look
from server.engine.device import to_device
from server.engine.kv_cache import KVCache
from server.engine.request import ScheduledSequence
from server.engine.stack import Stack

ENCODED_TOKENS = 512
"""Of one pass of the encoder, where a source alone is not longer: biases by distance are made for its square."""

Tokens = Callable[[int, int], Sequence[int]]
"""A sequence's token ids between two places."""


class TwoStacks:
    """Runs the batches of one patched encoder-decoder. Engine's thread only."""

    def __init__(self, base: BaseModel, scope: LoraScope, memory: LoraScope, cache: KVCache) -> None:
        """scope: of layers that read the tokens of a pass; memory: of those that read the encoder's output."""
        self.base = base
        self.scope = scope
        self.memory = memory
        self.cache = cache

    def forward(
        self, items: Sequence[ScheduledSequence], spans: Sequence[Span], logit_rows: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [T, hidden_size] of the targets' packed row, and logits [len(logit_rows), vocabulary] in fp32.

        spans: of the targets, each with its sequence's pages.
        """
        assert self.base.stacks is not None
        device = self.base.device
        new = [item for item in items if item.encodes]
        encoded = [self._encode(group) for group in _passes(new)]
        memory = (
            torch.cat(encoded)
            if encoded
            else torch.zeros(1, self.base.hidden_size, dtype=self.base.dtype, device=device)
        )
        looks = [
            Look(span.start, span.end, item.sequence.pages, len(item.sequence.source_ids))
            for item, span in zip(items, spans, strict=True)
        ]
        ids, rows = to_device(
            device,
            [[[t for item in items for t in item.sequence.tokens(item.start, item.start + item.count)]], logit_rows],
        )
        self._place(self.base.stacks.decoder, [(item.sequence.tokens, item.start, item.count) for item in items])
        with ExitStack() as scopes:
            slots = [item.slot for item in items for _ in range(item.count)]
            batch = LoraBatch.of_slots(slots).with_logits([slots[row] for row in logit_rows])
            scopes.enter_context(self.scope.use(batch))
            scopes.enter_context(self.memory.use(_over_sources(new)))
            scopes.enter_context(self.cache.use(spans, device, looks, _source_spans(new, cached=True)))
            return self.base.decode(ids, memory, rows if logit_rows else None)

    def _encode(self, items: Sequence[ScheduledSequence]) -> Tensor:
        """[S, hidden_size] of the sources, one after another."""
        assert self.base.stacks is not None
        device = self.base.device
        (ids,) = to_device(device, [[[token for item in items for token in item.sequence.source_ids]]])
        self._place(self.base.stacks.encoder, [(item.sequence.source, 0, item.num_source) for item in items])
        with self.scope.use(_over_sources(items)), self.cache.use(_source_spans(items, cached=False), device):
            return self.base.encode(ids)

    def _place(self, stack: Stack, parts: Sequence[tuple[Tokens, int, int]]) -> None:
        """The positions of the next pass: of tokens start … start + count − 1 of each sequence."""
        if stack.positions is None:
            return
        rule = stack.positions.rule
        places = [place for tokens, start, count in parts for place in rule.of(tokens, start, start + count)]
        (stack.positions.current,) = to_device(self.base.device, [[places]])


def _over_sources(items: Sequence[ScheduledSequence]) -> LoraBatch:
    return LoraBatch.of_slots([item.slot for item in items for _ in range(item.num_source)])


def _source_spans(items: Sequence[ScheduledSequence], cached: bool) -> list[Span]:
    spans, start = [], 0
    for item in items:
        end = start + item.num_source
        spans.append(Span(start, end, 0, item.sequence.pages if cached else None))
        start = end
    return spans


def _passes(items: Sequence[ScheduledSequence]) -> Iterator[list[ScheduledSequence]]:
    """Neighbours together, up to ENCODED_TOKENS."""
    group: list[ScheduledSequence] = []
    count = 0
    for item in items:
        if group and count + item.num_source > ENCODED_TOKENS:
            yield group
            group, count = [], 0
        group.append(item)
        count += item.num_source
    if group:
        yield group
