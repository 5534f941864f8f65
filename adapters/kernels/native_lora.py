"""The LoRA term by the compiled CPU kernels: shrink and expand fused, layers that share an input in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.batch import LoraBatch
from adapters.kernels.contract import LoraWeights
from adapters.kernels.library import Layer, Library


class NativeLora:
    """add_lora of contract.py for fp32 rows on the CPU; A and B in any of the pool's dtypes. Engine's thread only."""

    def __init__(self, library: Library) -> None:
        self._linear = library.linear

    def __call__(self, ys: Sequence[Tensor], x: Tensor, group: Sequence[LoraWeights], batch: LoraBatch) -> None:
        layers = (Layer * len(group))()
        for layer, y, weights in zip(layers, ys, group, strict=True):
            if y.dtype != torch.float32 or x.dtype != torch.float32 or x.stride(-1) != 1 or y.stride(-1) != 1:
                raise RuntimeError("the CPU kernel takes fp32 rows that are contiguous")
            layer.table = weights.table.ctypes.data
            layer.d_in, layer.d_out = weights.d_in, weights.d_out
            layer.y, layer.y_stride = y.data_ptr(), y.stride(0)
        segments, count = batch.native
        self._linear(ctypes.addressof(layers), len(layers), x.data_ptr(), x.stride(0), len(x), segments, count)
