"""Scoring: the log-probabilities of a prompt's own tokens, as `echo` with `logprobs` wants them. Engine's thread only.

log p(token i | tokens before i) stands in the logits of token i − 1, so that a prompt of n tokens has n − 1 of them.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from torch import Tensor

from server.engine.attention import Span
from server.engine.request import ScheduledSequence, Sequence, TokenLogprobs
from server.engine.sampler import token_logprobs


@dataclass(frozen=True)
class Scored:
    """What one step can tell of one prompt."""

    sequence: Sequence
    rows: list[int]
    """Of the packed row, whose logits tell of `tokens`."""
    tokens: list[int]


def to_score(items: SequenceOf[ScheduledSequence], spans: SequenceOf[Span]) -> list[Scored]:
    """Of the prompts that want it, what was not told yet: one computed again after a preemption repeats nothing."""
    found = []
    for item, span in zip(items, spans, strict=True):
        sequence = item.sequence
        if sequence.params is None or sequence.params.prompt_logprobs is None:
            continue
        first = max(item.start, len(sequence.prompt_logprobs))
        end = min(item.start + item.count, len(sequence.prompt_ids) - 1)
        if first < end:
            rows = [span.start + place - item.start for place in range(first, end)]
            found.append(Scored(sequence, rows, sequence.prompt_ids[first + 1 : end + 1]))
    return found


def score(logits: Tensor, wanted: SequenceOf[Scored]) -> dict[int, tuple[TokenLogprobs, ...]]:
    """By sequence id. logits: [rows of all `wanted`, vocabulary] fp32."""
    if not wanted:
        return {}
    tokens = [token for each in wanted for token in each.tokens]
    counts = [_alternatives(each.sequence) for each in wanted for _ in each.tokens]
    entries = iter(token_logprobs(logits.log_softmax(-1), tokens, counts))
    return {each.sequence.id: tuple(next(entries) for _ in each.tokens) for each in wanted}


def _alternatives(sequence: Sequence) -> int:
    assert sequence.params is not None
    return sequence.params.prompt_logprobs or 0
