"""LoraSlots: `max_loras` adapters that a forward pass can use at once.

Knows nothing of names, versions or who uses a slot. A slot is written between steps, never while one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter, Head, OwnTokens
from adapters.dora import Magnitudes
from adapters.kernels.contract import LoraTerm, LoraWeights
from adapters.layout import BaseLayout, as_linear
from adapters.token_slots import TokenSlots

Placing = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""Where a part of an adapter lies for the kernels, and where a vector does that may be changed there."""


class Placed(NamedTuple):
    """An adapter's numbers where the kernels find them."""

    terms: dict[str, LoraTerm]
    """By layer."""
    biases: dict[str, Tensor]
    """By norm."""
    head: Head | None
    tokens: OwnTokens | None = None


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


class RowBiases:
    """What the adapter in each slot adds to the output of one norm: its bias minus the base's."""

    def __init__(self, base: Tensor, max_loras: int) -> None:
        self.base = base
        self.terms: list[Tensor | None] = [None] * max_loras
        self.used: set[int] = set()
        """The slots that add something."""

    def set(self, slot: int, term: Tensor | None) -> None:
        """term: [d] fp32, or nothing."""
        self.terms[slot] = term
        if term is None:
            self.used.discard(slot)
        else:
            self.used.add(slot)


class LoraSlots:
    """The adapters that a forward pass can use, and their heads.

    On the CPU a slot points into the adapter's own host memory: writing it copies no factor. On another device each
    slot has a buffer, filled by one copy of the adapter's arena; `ready` must be called before a step uses it.
    """

    def __init__(
        self,
        body: nn.Module,
        layout: BaseLayout,
        max_loras: int,
        uploads: Uploads | None = None,
        output: nn.Linear | None = None,
    ) -> None:
        """uploads: needed where `body` is not on the CPU. output: the language-model head, where the layout has one."""
        self.max_loras = max_loras
        self._linears: dict[str, LoraWeights] = {}
        self.biases: dict[str, RowBiases] = {}
        self.heads: list[Head | None] = [None] * max_loras
        self.beside: list[str] = [""] * max_loras
        """What a slot's adapter does to a forward pass beside its terms on linear layers: dora, norm_biases,
        token_layers, or nothing."""
        self._uploads = uploads
        self._base_bias: dict[str, Tensor] = {}
        self._adapters: list[Adapter | None] = [None] * max_loras
        """Keeps the memory that the tables point at."""
        self._buffers: list[Tensor | None] = [None] * max_loras
        linears: dict[str, nn.Linear] = {}
        for name, shape in layout.linears.items():
            linear = as_linear(body.get_submodule(name))
            assert linear is not None
            linears[name] = linear
            self._linears[name] = LoraWeights(shape.d_in, shape.d_out, max_loras)
            if linear.bias is not None:
                self._base_bias[name] = linear.bias.detach().float().clone()
        self.tokens = TokenSlots(layout, output, max_loras)
        if layout.output is not None and output is not None:
            linears[layout.output.name] = output
            if output.bias is not None:
                self._base_bias[layout.output.name] = output.bias.detach().float().clone()
        self.weights = self._linears | self.tokens.weights
        """Of the body's linear layers, and of embedding and head, which `tokens` writes."""
        for name in layout.norms:
            bias = body.get_submodule(name).bias
            assert isinstance(bias, Tensor)
            self.biases[name] = RowBiases(bias.detach().float().clone(), max_loras)
        self.magnitudes = Magnitudes(linears)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put `adapter` into `slot`, replacing what was there. Engine's thread, between steps.

        For DoRA on the CPU the base is multiplied once with each adapter's A, on a GPU at every writing.
        """
        placed = self._point(adapter) if self._uploads is None else self._upload(self._uploads, slot, adapter)
        for name, weights in self._linears.items():
            weights.set(slot, placed.terms.get(name))
        for name, biases in self.biases.items():
            biases.set(slot, placed.biases.get(name))
        self.tokens.set(slot, placed.tokens, placed.terms)
        self.heads[slot] = placed.head
        self.beside[slot] = self._beside(slot)
        self._adapters[slot] = adapter

    def ready(self) -> None:
        """What runs from now on finds every slot as it was written. Engine's thread, before each step."""
        if self._uploads is not None:
            self._uploads.wait()

    def clear(self, slot: int) -> None:
        """Empty `slot`. Any thread, when no running sequence uses the slot."""
        for weights in self._linears.values():
            weights.set(slot, None)
        for biases in self.biases.values():
            biases.set(slot, None)
        self.tokens.set(slot, None, {})
        self.heads[slot] = None
        self.beside[slot] = ""
        self._adapters[slot] = None

    def _beside(self, slot: int) -> str:
        if self.tokens.holds(slot):
            return "token_layers"
        if any(slot in weights.rescaled for weights in self._linears.values()):
            return "dora"
        return "norm_biases" if any(slot in biases.used for biases in self.biases.values()) else ""

    def _point(self, adapter: Adapter) -> Placed:
        """On the CPU: the adapter's own memory, but for vectors that are made of its and the base's."""
        own: Placing = (lambda part: part.contiguous(), lambda vector: vector.float().clone())
        shifts = self._new_shifts(adapter)
        placed = _place(adapter, own, shifts)
        self._settle(adapter, placed, own)
        for name, pair in adapter.pairs.items():
            if pair.magnitude is not None:
                pair.magnitude, pair.divided = placed.terms[name].gain, True
        return placed

    @torch.inference_mode()
    def _upload(self, uploads: Uploads, slot: int, adapter: Adapter) -> Placed:
        """On another device: views of the slot's buffer, which a copy begins to fill."""
        memory = adapter.memory
        assert memory is not None, "an adapter for another device than the CPU lies in an arena"
        shifts = self._new_shifts(adapter)

        def views(buffer: Tensor) -> Placing:
            view = partial(_same_place, memory=memory, buffer=buffer)
            return view, view

        def settle(buffer: Tensor) -> None:
            self._settle(adapter, _place(adapter, views(buffer), shifts), views(buffer))

        buffer = self._buffers[slot] = uploads.copy(memory, self._buffers[slot], settle)
        return _place(adapter, views(buffer), shifts)

    def _new_shifts(self, adapter: Adapter) -> dict[str, Tensor]:
        """Room for the shifts of DoRA's layers, with the base's biases in it."""
        return {
            name: self._base_bias[name].clone()
            for name, pair in adapter.pairs.items()
            if pair.magnitude is not None and name in self._base_bias
        }

    def _settle(self, adapter: Adapter, placed: Placed, placing: Placing) -> None:
        """Bring what depends on the base into the vectors of `placed`, in place."""
        _, copy = placing
        fresh = {
            name: placed.terms[name]
            for name, pair in adapter.pairs.items()
            if pair.magnitude is not None and not pair.divided
        }
        if fresh:
            self.magnitudes.divide(fresh, self._base_bias)
        for name, pair in adapter.pairs.items():
            term = placed.terms[name]
            if term.shift is not None and term.gain is not None:
                if pair.bias is not None:
                    term.shift.copy_(copy(pair.bias))
                term.shift.addcmul_(term.gain, self._base_bias[name], value=-1)
            elif term.bias is not None and pair.bias is None:
                term.bias.mul_(pair.scaling)
            elif term.bias is not None:
                term.bias.sub_(self._base_bias[name])
                if pair.b_bias is not None:
                    term.bias.add_(copy(pair.b_bias), alpha=pair.scaling)
        for name, bias in placed.biases.items():
            bias.sub_(self.biases[name].base)


def _place(adapter: Adapter, placing: Placing, shifts: Mapping[str, Tensor]) -> Placed:
    """An adapter's numbers where the kernels find them; vectors as the checkpoint has them."""
    place, copy = placing
    terms = {}
    for name, pair in adapter.pairs.items():
        a, b = place(pair.a), place(pair.b.T)
        if pair.magnitude is not None:
            gain = place(pair.magnitude.float())
            terms[name] = LoraTerm(a, b, pair.scaling, gain=gain, shift=shifts.get(name))
        else:
            bias = pair.b_bias if pair.bias is None else pair.bias
            terms[name] = LoraTerm(a, b, pair.scaling, None if bias is None else copy(bias))
    head = adapter.head
    if head is not None:
        inner = {name: place(part.float()) for name, part in head.inner.items()}
        head = Head(place(head.weight.float()), None if head.bias is None else place(head.bias.float()), inner)
    tokens = None if adapter.tokens is None else adapter.tokens.placed(place)
    return Placed(terms, {name: copy(bias) for name, bias in adapter.biases.items()}, head, tokens)


def _same_place(part: Tensor, memory: Tensor, buffer: Tensor) -> Tensor:
    """What lies in `buffer` where `part`, contiguous, lies in `memory`."""
    start = part.data_ptr() - memory.data_ptr()
    return buffer[start : start + part.nbytes].view(part.dtype).view(part.shape)
