"""The slower forward pass, for encoders whose attention cannot be packed: transformers' own, a sequence a row.

Knows nothing of caches: each sequence is computed whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from adapters.batch import LoraBatch, LoraScope
from server.engine.base_model import BaseModel
from server.engine.device import to_device
from server.engine.request import ScheduledSequence


def forward_padded(base: BaseModel, scope: LoraScope, items: Sequence[ScheduledSequence]) -> Tensor:
    """Hidden states [T, hidden_size] of the sequences, one after another, as a packed row has them.

    Neighbours with the same adapter are one forward pass [n, L], padded, under an attention mask; each adapter has a
    pass of its own, since such a base may send more than tokens through its layers: embeddings of distances, say, that
    all rows share. Engine's thread.
    """
    parts: list[Tensor] = []
    for slot, run in groupby(items, key=attrgetter("slot")):
        rows = [item.sequence.tokens(0, item.count) for item in run]
        longest = max(map(len, rows))
        padding = base.pad_id or 0
        padded = [[*row, *[padding] * (longest - len(row))] for row in rows]
        masks = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        input_ids, attention_mask = to_device(base.device, [padded, masks])
        with scope.use(LoraBatch.of_one(slot, len(rows) * longest)):
            hidden = base.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        parts.extend(hidden[i, : len(row)] for i, row in enumerate(rows))
    return torch.cat(parts)
