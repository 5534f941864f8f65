"""LoraSlots: `max_loras` adapters that a forward pass can use at once.

Knows nothing of names, versions or who uses a slot. A slot is written between steps, never while one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, Head
from adapters.kernels.contract import LoraTerm, LoraWeights
from adapters.layout import BaseLayout, as_linear

Placed = tuple[dict[str, LoraTerm], Head | None]
"""An adapter's terms by layer, and its head, where the kernels find them."""


class Uploads(Protocol):
    """Copies of arenas into device memory, beside the forward passes. Engine's thread only."""

    def copy(self, memory: Tensor, buffer: Tensor | None, then: Callable[[Tensor], None]) -> Tensor:
        """Begin to copy `memory` into `buffer`, or into a new one where that is too small; the buffer.

        `then` is called with it, and what it queues runs after the copy. What was queued before still finds the
        buffer's old content. `memory` may be let go at once.
        """
        ...

    def wait(self) -> None:
        """What is queued from now on finds what was copied."""
        ...


class StreamUploads:
    """Uploads by a CUDA stream of their own: no call waits for the device. Runs only with a GPU.

    The streams wait for each other by events. An arena must be pinned; torch's allocator of pinned memory gives it to
    nobody else before copies out of it have ended, and `record_stream` asks the same of a buffer that is replaced.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._begun = False

    def copy(self, memory: Tensor, buffer: Tensor | None, then: Callable[[Tensor], None]) -> Tensor:
        assert memory.is_pinned(), "a copy from memory that is not pinned waits for the device"
        if buffer is None or len(buffer) < len(memory):
            buffer = torch.empty(len(memory), dtype=torch.uint8, device=self._device)
            buffer.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer[: len(memory)].copy_(memory, non_blocking=True)
            then(buffer)
        self._begun = True
        return buffer

    def wait(self) -> None:
        if self._begun:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._begun = False


class LoraSlots:
    """The adapters that a forward pass can use, and their heads.

    On the CPU a slot points into the adapter's own host memory: writing it copies nothing. On another device each slot
    has a buffer, filled by one copy of the adapter's arena; `ready` must be called before a step uses it.
    """

    def __init__(self, body: nn.Module, layout: BaseLayout, max_loras: int, uploads: Uploads | None = None) -> None:
        """uploads: needed where `body` is not on the CPU."""
        self.max_loras = max_loras
        self.weights: dict[str, LoraWeights] = {}
        self.heads: list[Head | None] = [None] * max_loras
        self._uploads = uploads
        self._base_bias: dict[str, Tensor] = {}
        self._adapters: list[Adapter | None] = [None] * max_loras
        """Keeps the memory that the tables point at."""
        self._buffers: list[Tensor | None] = [None] * max_loras
        for name, shape in layout.linears.items():
            linear = as_linear(body.get_submodule(name))
            assert linear is not None
            self.weights[name] = LoraWeights(shape.d_in, shape.d_out, max_loras)
            if linear.bias is not None:
                self._base_bias[name] = linear.bias.detach().float().clone()

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put `adapter` into `slot`, replacing what was there. Engine's thread, between steps."""
        if self._uploads is None:
            terms, head = self._point(adapter)
        else:
            terms, head = self._upload(self._uploads, slot, adapter)
        for name, weights in self.weights.items():
            weights.set(slot, terms.get(name))
        self.heads[slot] = head
        self._adapters[slot] = adapter

    def ready(self) -> None:
        """What runs from now on finds every slot as it was written. Engine's thread, before each step."""
        if self._uploads is not None:
            self._uploads.wait()

    def clear(self, slot: int) -> None:
        """Empty `slot`. Any thread, when no running sequence uses the slot."""
        for weights in self.weights.values():
            weights.set(slot, None)
        self.heads[slot] = None
        self._adapters[slot] = None

    def _point(self, adapter: Adapter) -> Placed:
        """On the CPU: the adapter's own memory."""
        terms = {}
        for name, pair in adapter.pairs.items():
            bias = None if pair.bias is None else pair.bias.float() - self._base_bias[name]
            terms[name] = LoraTerm(pair.a.contiguous(), pair.b.T.contiguous(), pair.scaling, bias)
        head = adapter.head
        if head is not None:
            head = Head(head.weight.float(), None if head.bias is None else head.bias.float())
        return terms, head

    @torch.inference_mode()
    def _upload(self, uploads: Uploads, slot: int, adapter: Adapter) -> Placed:
        """On another device: views of the slot's buffer, which a copy begins to fill."""
        memory, pairs, head = adapter.memory, adapter.pairs, adapter.head
        assert memory is not None, "an adapter for another device than the CPU lies in an arena"

        def subtract_base(buffer: Tensor) -> None:
            for name, pair in pairs.items():
                if pair.bias is not None:
                    _same_place(pair.bias, memory, buffer).sub_(self._base_bias[name])

        buffer = self._buffers[slot] = uploads.copy(memory, self._buffers[slot], subtract_base)
        terms = {}
        for name, pair in pairs.items():
            a, b = (_same_place(part, memory, buffer) for part in (pair.a, pair.b.T))
            bias = None if pair.bias is None else _same_place(pair.bias, memory, buffer)
            terms[name] = LoraTerm(a, b, pair.scaling, bias)
        if head is not None:
            bias = None if head.bias is None else _same_place(head.bias, memory, buffer)
            head = Head(_same_place(head.weight, memory, buffer), bias)
        return terms, head


def _same_place(part: Tensor, memory: Tensor, buffer: Tensor) -> Tensor:
    """What lies in `buffer` where `part`, contiguous, lies in `memory`."""
    start = part.data_ptr() - memory.data_ptr()
    return buffer[start : start + part.nbytes].view(part.dtype).view(part.shape)
