"""PackedLinear: a frozen linear layer with W in the layout that the processor multiplies fastest. fp32 throughout.

Knows nothing of adapters. W never changes, so it is packed once; the model's own tensor need not stay.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

PACKED_FOR_ROWS = 32
"""One packing serves all row counts: measured from 1 to 1,024, none was faster with another."""


class PackedLinear(nn.Module):
    """y = x Wᵀ + bias by oneDNN on a blocked copy of W. Made only where `can_pack`. Engine's thread only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_FOR_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_in] -> y: [..., d_out], contiguous."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


def can_pack(linear: nn.Linear) -> bool:
    """Whether PackedLinear serves this layer: fp32, on an x86 processor."""
    weight = linear.weight
    return (
        type(linear) is nn.Linear
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
