"""The definition of the LoRA term: an fp32 loop over tokens. Slow; every kernel is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapters.batch import LoraBatch
from adapters.kernels.contract import LoraWeights


def add_lora_reference(ys: Sequence[Tensor], x: Tensor, group: Sequence[LoraWeights], batch: LoraBatch) -> None:
    """y[t] += scaling · (x[t] · aᵀ) · b + bias, one token at a time, all in fp32 (see contract.AddLora)."""
    for y, weights in zip(ys, group, strict=True):
        for slot, start, end in batch.segments:
            term = weights.terms[slot]
            if term is None:
                continue
            a, b = term.a.float(), term.b.float()
            for t in range(start, end):
                delta = (x[t].float() @ a.T) * term.scaling @ b
                if term.bias is not None:
                    delta = delta + term.bias
                y[t] = (y[t].float() + delta).to(y.dtype)
