"""The slower forward pass, for encoders whose attention cannot be packed: transformers' own, a sequence a row.

Knows nothing of caches: each sequence is computed whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from adapters.batch import LoraBatch, LoraScope
from server.engine.base_model import BaseModel
from server.engine.device import to_device
from server.engine.request import ScheduledSequence

PASS_TOKENS = 2048
"""Padding included."""


def forward_padded(base: BaseModel, scope: LoraScope, items: Sequence[ScheduledSequence]) -> Tensor:
    """Hidden states [T, hidden_size] of the sequences, one after another, as a packed row has them.

    Neighbours with the same adapter are passes [n, L] of similar lengths, padded, under an attention mask, of at most
    PASS_TOKENS tokens where a sequence alone is not longer. Each adapter has passes of its own, since such a base may
    send more than tokens through its layers: embeddings of distances, say, that all rows share. Engine's thread.
    """
    parts: dict[int, Tensor] = {}
    for slot, run in groupby(range(len(items)), key=lambda i: items[i].slot):
        rows = {i: items[i].sequence.tokens(0, items[i].count) for i in run}
        for chosen in _passes({i: len(row) for i, row in rows.items()}):
            longest = max(len(rows[i]) for i in chosen)
            padding = base.pad_id or 0
            padded = [[*rows[i], *[padding] * (longest - len(rows[i]))] for i in chosen]
            masks = [[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in chosen]
            input_ids, attention_mask = to_device(base.device, [padded, masks])
            with scope.use(LoraBatch.of_one(slot, len(chosen) * longest)):
                hidden = base.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            parts |= {i: hidden[place, : len(rows[i])] for place, i in enumerate(chosen)}
    return torch.cat([parts[i] for i in range(len(items))])


def _passes(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Keys in groups, the shortest first."""
    group: list[int] = []
    for key in sorted(lengths, key=lambda key: lengths[key]):
        if group and (len(group) + 1) * lengths[key] > PASS_TOKENS:
            yield group
            group = []
        group.append(key)
    yield group
