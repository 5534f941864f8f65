"""Per-adapter heads: each row through the classifier of its own adapter, any number of labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from adapters.slots import LoraSlots


def apply_heads(slots: LoraSlots, hidden: Tensor, row_slots: Sequence[int]) -> list[Tensor]:
    """logits of each row: h Wᵀ + bias, with the head in that row's slot.

    hidden: [n, hidden_size] in any order of slots; returns n tensors [num_labels of that row], fp32. Engine's thread.
    """
    results: list[Tensor | None] = [None] * len(row_slots)
    rows_of: dict[int, list[int]] = {}
    for row, slot in enumerate(row_slots):
        rows_of.setdefault(slot, []).append(row)
    for slot, rows in rows_of.items():
        head = slots.heads[slot]
        if head is None:
            raise RuntimeError(f"slot {slot} holds no head")
        logits = F.linear(hidden[rows].float(), head.weight, head.bias)
        for row, values in zip(rows, logits, strict=True):
            results[row] = values
    return [result for result in results if result is not None]
