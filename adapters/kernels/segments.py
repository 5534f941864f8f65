"""The LoRA term with plain torch operations: two matrix products for each segment."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapters.batch import LoraBatch
from adapters.kernels.contract import LoraWeights


def add_lora_segments(ys: Sequence[Tensor], x: Tensor, group: Sequence[LoraWeights], batch: LoraBatch) -> None:
    """y[t] += scaling · (x[t] · aᵀ) · b + bias, a segment at a time (see contract.AddLora).

    Fast where segments are few or long: tokens ordered by slot give one segment an adapter. Runs on any device.
    """
    for y, weights in zip(ys, group, strict=True):
        for slot, start, end in batch.segments:
            term = weights.terms[slot]
            if term is None:
                continue
            part = y[start:end]
            shrunk = (x[start:end].float() @ term.a.float().T) * term.scaling
            delta = shrunk @ term.b.float()
            if term.bias is not None:
                delta += term.bias
            part += delta
