"""Restraints: what changes logits before a token is chosen, all rows at once: biases, tokens out of reach, penalties.

Knows nothing of batches, text or adapters. Engine's thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from server.engine.device import to_device
from server.engine.request import SamplingParams, Sequence


class Places:
    """Logits that are changed in one way, each by an amount of its own."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int64]] = []
        self._ids: list[NDArray[np.int64]] = []
        self._amounts: list[NDArray[np.float32]] = []

    def add(self, row: int, ids: ArrayLike, amounts: ArrayLike) -> None:
        """Tokens of one row, none of them twice; amounts: one for each, or for all."""
        places = np.asarray(ids, np.int64)
        self._rows.append(np.full(places.shape, row))
        self._ids.append(places)
        self._amounts.append(np.broadcast_to(np.asarray(amounts, np.float32), places.shape))

    def change(self, logits: Tensor, changed: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Each becomes what `changed` makes of it and its amount, in place."""
        if not any(ids.size for ids in self._ids):
            return
        rows, ids = to_device(logits.device, [np.concatenate(self._rows), np.concatenate(self._ids)])
        (amounts,) = to_device(logits.device, [np.concatenate(self._amounts)], torch.float32)
        logits[rows, ids] = changed(logits[rows, ids], amounts)


def is_restrained(sequence: Sequence, params: SamplingParams) -> bool:
    """Whether `restrain` changes its row."""
    early = len(sequence.output_ids) < params.min_tokens
    return bool(early or params.logit_bias or params.penalised or sequence.forbidden)


def restrain(logits: Tensor, restrained: Mapping[int, tuple[Sequence, SamplingParams]]) -> None:
    """Change these rows in place. logits: [n, vocabulary] fp32.

    bias: logit + b (OpenAI).
    End tokens are out of reach before `min_tokens`, forbidden ones ever: −infinity.
    repetition (prompt and output): logit / p if positive, · p if negative (Keskar et al., arXiv:1909.05858).
    frequency, presence (output only): logit − count · f − p (OpenAI).
    """
    biased, unreachable, repeated, counted = Places(), Places(), Places(), Places()
    for row, (sequence, params) in restrained.items():
        if params.logit_bias:
            biased.add(row, *zip(*params.logit_bias, strict=True))
        unreachable.add(row, _unreachable(sequence, params, logits.shape[-1]), float("-inf"))
        if params.penalised:
            ids, times = sequence.token_counts.after(sequence.output_ids)
            known = ids < logits.shape[-1]  # a prompt may hold tokens that are never generated
            ids, times = ids[known], times[known]
            if params.repetition_penalty != 1.0:
                repeated.add(row, ids, params.repetition_penalty)
            if params.frequency_penalty or params.presence_penalty:
                generated = times > 0
                amounts = times[generated] * params.frequency_penalty + params.presence_penalty
                counted.add(row, ids[generated], amounts)
    biased.change(logits, torch.add)
    unreachable.change(logits, lambda _, amounts: amounts)
    repeated.change(logits, lambda values, p: torch.where(values > 0, values / p, values * p))
    counted.change(logits, torch.sub)


def _unreachable(sequence: Sequence, params: SamplingParams, vocabulary: int) -> list[int]:
    tokens = set(sequence.forbidden)
    if len(sequence.output_ids) < params.min_tokens:
        ends = params.stop_token_ids | (frozenset() if params.ignore_eos else sequence.eos_ids)
        tokens |= {end for end in ends if end < vocabulary}
    return sorted(tokens)
