"""LoraSlots: device memory for `max_loras` adapters at once, stacked per target module.

Knows nothing of names, versions or who uses a slot. A slot is written between steps, never while one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, Head
from adapters.kernels.contract import LoraWeights
from adapters.layout import BaseLayout
from adapters.memory import lazy_zeros


class LoraSlots:
    """The adapters that a forward pass can use, and their heads.

    Memory is reserved for `max_loras × max_lora_rank` rows per module. On the CPU, pages of it that no adapter has
    filled cost nothing.
    """

    def __init__(
        self,
        body: nn.Module,
        layout: BaseLayout,
        max_loras: int,
        max_lora_rank: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.max_loras = max_loras
        self.max_lora_rank = max_lora_rank
        self.weights: dict[str, LoraWeights] = {}
        self.heads: list[Head | None] = [None] * max_loras
        self._base_bias: dict[str, Tensor] = {}
        for name, shape in layout.linears.items():
            linear = body.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            device = linear.weight.device
            self.weights[name] = LoraWeights(
                a=lazy_zeros((max_loras, max_lora_rank, shape.d_in), dtype, device),
                b=lazy_zeros((max_loras, max_lora_rank, shape.d_out), dtype, device),
                ranks=[0] * max_loras,
                bias=[None] * max_loras,
            )
            if linear.bias is not None:
                self._base_bias[name] = linear.bias.detach()

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put `adapter` into `slot`, replacing what was there. Engine's thread, between steps."""
        self.clear(slot)
        for name, pair in adapter.pairs.items():
            weights = self.weights[name]
            rank = pair.a.shape[0]
            weights.a[slot, :rank].copy_(pair.a)
            weights.b[slot, :rank].copy_(pair.b.float().T * pair.scaling)
            if pair.bias is not None:
                base = self._base_bias[name]
                weights.bias[slot] = pair.bias.to(base.device, torch.float32) - base.float()
            weights.ranks[slot] = rank
        if adapter.head is not None:
            self.heads[slot] = self._head_on_device(adapter.head)

    def clear(self, slot: int) -> None:
        """Empty `slot`. Any thread, when no running sequence uses the slot."""
        for weights in self.weights.values():
            weights.ranks[slot] = 0
            weights.bias[slot] = None
        self.heads[slot] = None

    def _head_on_device(self, head: Head) -> Head:
        device = next(iter(self.weights.values())).a.device
        bias = None if head.bias is None else head.bias.to(device, torch.float32)
        return Head(head.weight.to(device, torch.float32), bias)
