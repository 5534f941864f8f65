"""LoraSlots: `max_loras` adapters that a forward pass can use at once.

Knows nothing of names, versions or who uses a slot. A slot is written between steps, never while one runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, Head, LoraPair
from adapters.kernels.contract import LoraTerm, LoraWeights
from adapters.layout import BaseLayout


class LoraSlots:
    """The adapters that a forward pass can use, and their heads.

    On the CPU a slot points into the adapter's own host memory: writing it copies nothing. On another device each slot
    has a buffer, filled by one copy of the adapter's arena.
    """

    def __init__(self, body: nn.Module, layout: BaseLayout, max_loras: int) -> None:
        self.max_loras = max_loras
        self.weights: dict[str, LoraWeights] = {}
        self.heads: list[Head | None] = [None] * max_loras
        self.device = next(body.parameters()).device
        self._base_bias: dict[str, Tensor] = {}
        self._adapters: list[Adapter | None] = [None] * max_loras
        """Keeps the memory that the tables point at."""
        self._buffers: list[Tensor | None] = [None] * max_loras
        for name, shape in layout.linears.items():
            linear = body.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.weights[name] = LoraWeights(shape.d_in, shape.d_out, max_loras)
            if linear.bias is not None:
                self._base_bias[name] = linear.bias.detach().float().clone()

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put `adapter` into `slot`, replacing what was there. Engine's thread, between steps."""
        self.clear(slot)
        pairs = adapter.pairs
        if self.device.type != "cpu":
            pairs = self._copy_to_device(slot, adapter)
        for name, pair in pairs.items():
            bias = None if pair.bias is None else pair.bias.to(self.device, torch.float32) - self._base_bias[name]
            self.weights[name].set(slot, LoraTerm(pair.a.contiguous(), pair.b.T.contiguous(), pair.scaling, bias))
        self._adapters[slot] = adapter
        if adapter.head is not None:
            self.heads[slot] = self._head_on_device(adapter.head)

    def clear(self, slot: int) -> None:
        """Empty `slot`. Any thread, when no running sequence uses the slot."""
        for weights in self.weights.values():
            weights.set(slot, None)
        self.heads[slot] = None
        self._adapters[slot] = None

    def _copy_to_device(self, slot: int, adapter: Adapter) -> dict[str, LoraPair]:
        """The pairs of `adapter` as views of the slot's buffer."""
        memory = adapter.memory
        assert memory is not None, "an adapter for another device than the CPU lies in an arena"
        buffer = self._buffers[slot]
        if buffer is None or len(buffer) < len(memory):
            buffer = self._buffers[slot] = torch.empty_like(memory, device=self.device)
        buffer[: len(memory)].copy_(memory, non_blocking=True)

        def moved(part: Tensor) -> Tensor:
            start = part.data_ptr() - memory.data_ptr()
            return buffer[start : start + part.numel() * part.element_size()].view(part.dtype).view(part.shape)

        return {
            name: LoraPair(moved(pair.a), moved(pair.b.T).T, pair.scaling, pair.bias)
            for name, pair in adapter.pairs.items()
        }

    def _head_on_device(self, head: Head) -> Head:
        bias = None if head.bias is None else head.bias.to(self.device, torch.float32)
        return Head(head.weight.to(self.device, torch.float32), bias)
