"""The definition of the LoRA term: an fp32 loop over tokens. Slow; every kernel is tested against it."""

from __future__ import annotations

from torch import Tensor

from adapters.batch import LoraBatch
from adapters.kernels.contract import LoraWeights


def add_lora_reference(y: Tensor, x: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """y[t] += (x[t] · Aᵀ) · B + bias, one token at a time, all in fp32 (see contract.AddLora)."""
    for slot, start, end in batch.segments:
        rank = weights.ranks[slot]
        if rank == 0:
            continue
        a = weights.a[slot, :rank].float()
        b = weights.b[slot, :rank].float()
        bias = weights.bias[slot]
        for t in range(start, end):
            delta = (x[t].float() @ a.T) @ b
            if bias is not None:
                delta = delta + bias.float()
            y[t] = (y[t].float() + delta).to(y.dtype)
