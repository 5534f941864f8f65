"""The LoRA term with plain torch operations: two matrix products for each segment."""

from __future__ import annotations

from torch import Tensor

from adapters.batch import LoraBatch
from adapters.kernels.contract import LoraWeights


def add_lora_segments(y: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """y[t] += (x[t] · Aᵀ) · B + bias, a segment at a time (see contract.AddLora).

    Fast where segments are few or long: tokens ordered by slot give one segment an adapter.
    """
    ranks = weights.ranks
    for slot, start, end in batch.segments:
        rank = ranks[slot]
        if rank == 0:
            continue
        part = y[start:end]
        shrunk = x[start:end] @ weights.a[slot, :rank].T
        part.addmm_(shrunk, weights.b[slot, :rank])
        bias = weights.bias[slot]
        if bias is not None:
            part += bias
