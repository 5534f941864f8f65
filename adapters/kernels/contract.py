"""The kernel contract: what every implementation of the LoRA term computes, on what.

Knows nothing of modules, requests or how slots are filled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from adapters.batch import LoraBatch


@dataclass
class LoraWeights:
    """The adapters of all slots for one linear layer.

    `b` is rank-major, so that shrink and expand both stream rows, and holds scaling · Bᵀ, scaled in fp32 before any
    cast. Rows of a slot past its rank are never read.
    """

    a: Tensor  # [max_loras, max_rank, d_in]
    b: Tensor  # [max_loras, max_rank, d_out], scaling folded in
    ranks: list[int]  # [max_loras]; 0: this layer is not adapted in that slot
    bias: list[Tensor | None]  # [max_loras] of [d_out]: the adapter's bias minus the base's


AddLora = Callable[[Tensor, Tensor, LoraWeights, LoraBatch], None]
"""add_lora(y, x, weights, batch): in place, for every segment (slot s, tokens t) of the batch,

    y[t] += (x[t] · a[s, :r]ᵀ) · b[s, :r] + bias[s]        r = ranks[s]

y: [T, d_out], x: [T, d_in], rows contiguous. Tokens in no segment, and segments of a slot with rank 0, are not
touched. Engine's thread only.
"""
