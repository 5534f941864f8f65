"""Per-adapter heads: each row through the classifier of its own adapter, any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor
from torch.nn import functional as F

from adapters.slots import LoraSlots


def apply_heads(slots: LoraSlots, hidden: Tensor, row_slots: Sequence[int]) -> list[Tensor]:
    """logits of each row: h Wᵀ + bias, by the last layer of the head in that row's slot.

    hidden: [n, hidden_size] as that layer reads them, on the slots' device; returns n tensors [num_labels of that row],
    fp32. Rows of one slot are computed together where they are neighbours. Engine's thread; nothing waits for the
    device.
    """
    results: list[Tensor] = []
    start = 0
    for slot, run in groupby(row_slots):
        end = start + sum(1 for _ in run)
        head = slots.heads[slot]
        if head is None:
            raise RuntimeError(f"slot {slot} holds no head")
        results.extend(F.linear(hidden[start:end].float(), head.weight, head.bias))
        start = end
    return results
