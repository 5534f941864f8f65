"""The base's products, y = x Wᵀ + bias, of linear layers that share an input; on the CPU with the LoRA term at once.

Knows nothing of slots or modules' names. The ways to compute: torch's own (any device and dtype), oneDNN on a packed W
(packed.py), and our CPU kernels on a packed W, which do all that each token's adapter asks for in the same call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from adapters.batch import LoraBatch
from adapters.kernels.contract import POOL_DTYPES, LoraWeights
from adapters.kernels.library import INT8, INT8_DYNAMIC, Layer, Library
from adapters.memory import LargePages

QUANTIZED = {"int8": INT8, "int8-dynamic": INT8_DYNAMIC}
"""By the name in the configuration: 8-bit weights; 8-bit weights and inputs."""
COMPARED_ROWS = 1024


class Products(Protocol):
    """Linear layers of one input. Engine's thread only."""

    fused: bool
    """Whether `compute` adds the LoRA term itself, and applies DoRA's gain."""

    def compute(self, x: Tensor, batch: LoraBatch | None) -> list[Tensor]:
        """x: [..., d_in] -> for each layer [..., d_out], contiguous; with `batch` and `fused`, adapted too."""
        ...


class PlainProducts:
    """Each layer by itself."""

    fused = False

    def __init__(self, layers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._layers = tuple(layers)

    def compute(self, x: Tensor, batch: LoraBatch | None) -> list[Tensor]:
        del batch
        return [layer(x) for layer in self._layers]


class NativeProducts:
    """All layers in one call of the CPU kernels; W packed, in 16 bits where that holds it exactly, or quantised."""

    fused = True

    def __init__(
        self,
        library: Library,
        linears: Sequence[nn.Linear],
        weights: Sequence[LoraWeights],
        memory: LargePages,
        quantize: str = "",
    ) -> None:
        self._library = library
        self._d_in = linears[0].in_features
        self._d_outs = [linear.out_features for linear in linears]
        self._layers = (Layer * len(linears))()
        self.address = ctypes.addressof(self._layers)
        """Of the layers as the kernels know them (library.Layer), side by side."""
        self._packed: list[Tensor] = []
        self._kept: list[Tensor | LoraWeights] = [*weights]
        for i, (layer, linear) in enumerate(zip(self._layers, linears, strict=True)):
            form = QUANTIZED.get(quantize, exact_form(linear.weight))
            packed = library.pack(linear.weight.detach(), form, memory)
            self._packed.append(packed)
            layer.packed, layer.dtype = packed.data_ptr(), form
            layer.d_in, layer.d_out, layer.y_stride = self._d_in, linear.out_features, linear.out_features
            layer.table = weights[i].table.ctypes.data if weights else None
            if linear.bias is not None:
                bias = linear.bias.detach().clone()
                self._kept.append(bias)
                layer.bias = bias.data_ptr()

    def panels(self, index: int) -> Tensor:
        """W of one layer, not quantised, as Library.panels has it."""
        return self._library.panels(self._packed[index], self._d_in, self._layers[index].dtype)

    def compute(self, x: Tensor, batch: LoraBatch | None) -> list[Tensor]:
        rows = x if x.is_contiguous() else x.contiguous()
        shape = x.shape[:-1]
        ys = [x.new_empty((*shape, d_out)) for d_out in self._d_outs]
        for layer, y in zip(self._layers, ys, strict=True):
            layer.y = y.data_ptr()
        segments, count = (None, 0) if batch is None else batch.native
        self._library.linear(
            self.address, len(ys), rows.data_ptr(), self._d_in, rows.numel() // self._d_in, segments, count
        )
        return ys


class NativeLinear(nn.Module):
    """One linear layer without adapters by the CPU kernels."""

    def __init__(self, library: Library, linear: nn.Linear, memory: LargePages, quantize: str = "") -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._products = NativeProducts(library, [linear], [], memory, quantize)

    def panels(self) -> Tensor:
        """W, not quantised, as Library.panels has it."""
        return self._products.panels(0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in] -> y: [..., d_out], contiguous."""
        return self._products.compute(x, None)[0]


class NativeEmbedding(nn.Module):
    """Rows of the W that a packed layer holds exactly, for an embedding that is tied to it: W is held once."""

    def __init__(self, panels: Tensor, num_embeddings: int, embedding_dim: int) -> None:
        """panels: as Library.panels has them."""
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self._panels = panels
        self._width = self._panels.shape[2]

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] int64 -> [..., d_in] fp32, contiguous."""
        rows = self._panels[ids // self._width, :, ids % self._width].flatten(-2)
        return rows[..., : self.embedding_dim].float()


def exact_form(weight: Tensor) -> int:
    """The narrowest of POOL_DTYPES that holds `weight` exactly, by its place."""
    narrow = (torch.bfloat16, torch.float16)
    parts = torch.split(weight, COMPARED_ROWS)  # copies of all of it would be the largest thing in memory
    dtype = next((d for d in narrow if all(torch.equal(part.to(d).float(), part) for part in parts)), torch.float32)
    return POOL_DTYPES.index(dtype)


def can_pack_natively(linear: nn.Linear) -> bool:
    """Whether NativeProducts serves this layer: fp32 on the CPU."""
    return type(linear) is nn.Linear and linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32
