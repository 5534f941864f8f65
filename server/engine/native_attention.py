"""Attention by the compiled CPU kernels: over the pages where they lie, without copies, padding or masks.

Computed in fp32; pages hold fp32 or, rounded, 16 bits. Nothing is read before it was written, so that pages need no
clearing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.kernels.contract import POOL_DTYPES
from adapters.kernels.library import Attention, Library
from adapters.memory import lazy_zeros
from server.engine.attention import Rope, Rule, Span, fits

CPU = torch.device("cpu")


@dataclass(frozen=True)
class NativeContext:
    """What attention needs to know of one packed row."""

    spans: NDArray[np.int32]  # [n, 4] start, end, context, place of the first page in `pages` (−1: no cache)
    pages: NDArray[np.int32]
    cached: bool
    """Whether any sequence has pages."""
    spans_address: int
    pages_address: int


@dataclass
class _Layer:
    """One layer's pages, and the arguments of its next call."""

    call: Attention
    keys: Tensor | None = None  # [num_blocks, kv_heads, d, block_size]
    values: Tensor | None = None  # [num_blocks, kv_heads, block_size, v_width]


class NativeAttention:
    """An AttentionBackend for fp32 on the CPU; block_size must be a multiple of the library's lanes.

    Keys and values of sequences with pages are always read from these, so that a prompt gives the same whether it comes
    in one step or in chunks. Sequences without pages are exact.
    """

    def __init__(self, library: Library, num_blocks: int, block_size: int) -> None:
        assert block_size % library.lanes == 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.page_dtype = torch.float32
        """Of keys and values in pages: one of POOL_DTYPES."""
        self._library = library
        self._layers: dict[int | None, _Layer] = {}
        self._layer_bytes: dict[int | None, int] = {}
        self.generation = 0
        """Grows when pages become others, and with them what `describe` told."""

    @property
    def bytes_per_block(self) -> int:
        return sum(self._layer_bytes.values())

    def resize(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._layers.clear()
        self.generation += 1

    def hold_in(self, dtype: torch.dtype) -> None:
        """Forget all keys and values, and hold them in `dtype`, one of POOL_DTYPES, from now on.

        Rounded to nearest even; beyond the largest number of `dtype` stands that; infinity and NaN stay.
        """
        self.page_dtype = dtype
        self._layers.clear()
        self._layer_bytes.clear()
        self.generation += 1

    def clear(self, pages: Sequence[int]) -> None:
        """Nothing to do."""

    def context(self, spans: Sequence[Span], device: torch.device) -> NativeContext:
        del device
        return native_context(spans)

    def attend(  # noqa: PLR0913, PLR0917
        self, layer: int | None, q: Tensor, k: Tensor, v: Tensor, rule: Rule, context: NativeContext, rope: Rope | None
    ) -> Tensor:
        q, k, v = _usable(q), _usable(k), _usable(v)
        state = self._state(layer)
        if context.cached and state.keys is None:
            self._add_pages(layer, state, k, v)
        out = torch.empty((q.shape[0], q.shape[1], v.shape[2]))
        call = state.call
        self._describe(call, k, v)
        _ask(call, q, out)
        _rule(call, rule)
        if rope is not None:
            _check(rope, q)
            call.cos, call.sin, call.rope_row = rope.cos.data_ptr(), rope.sin.data_ptr(), rope.cos.stride(0)
            call.rotated = rope.cos.shape[1]
        else:
            call.cos = call.sin = None
        self._run(call, context)
        return out

    def describe(self, layer: int, rule: Rule, heads: int, k: Tensor, v: Tensor) -> int:
        """The address of a layer's attention as the kernels know it (library.Attention), valid in this `generation`.

        With pages, sizes and rule, for keys and values like `k` and `v`: [T, kv_heads, d].
        """
        state = self._state(layer)
        if state.keys is None:
            self._add_pages(layer, state, k, v)
        self._describe(state.call, k, v)
        state.call.heads = heads
        _rule(state.call, rule)
        return ctypes.addressof(state.call)

    def keep(self, layer: int, k: Tensor, v: Tensor, context: NativeContext) -> None:
        """Store keys [T, kv_heads, d] and values [T, kv_heads, v_d] in pages, and attend to nothing."""
        k, v = _usable(k), _usable(v)
        state = self._state(layer)
        if state.keys is None:
            self._add_pages(layer, state, k, v)
        self._describe(state.call, k, v)
        state.call.heads = k.shape[1]
        state.call.q = state.call.cos = None
        self._run(state.call, context)

    def look(self, layer: int, q: Tensor, rule: Rule, context: NativeContext) -> Tensor:
        """Attention over pages as they are: q [T, heads, d] -> [T, heads, v_d]. Every token sees all of its span's
        context, which `context` tells as that of its last token."""
        q, call = _usable(q), self._state(layer).call
        out = torch.empty((q.shape[0], q.shape[1], call.v_d))
        _ask(call, q, out)
        call.k = call.cos = call.bias = None
        call.scale, call.softcap, call.causal, call.window = rule.scale, 0.0, 0, 0
        self._run(call, context)
        return out

    def _state(self, layer: int | None) -> _Layer:
        state = self._layers.get(layer)
        if state is None:
            state = self._layers[layer] = _Layer(Attention())
        return state

    def _run(self, call: Attention, context: NativeContext) -> None:
        self._library.attend(ctypes.addressof(call), context.spans_address, len(context.spans), context.pages_address)

    def _describe(self, call: Attention, k: Tensor, v: Tensor) -> None:
        call.kv_heads, call.d, call.v_d = k.shape[1], k.shape[2], v.shape[2]
        call.v_width, call.block_size = self._width(v), self.block_size
        call.k, call.v = k.data_ptr(), v.data_ptr()
        call.q_norm.weight = call.k_norm.weight = None  # a decoder's layers have set theirs
        call.k_row, call.k_head, _ = k.stride()
        call.v_row, call.v_head, _ = v.stride()

    def _width(self, v: Tensor) -> int:
        lanes = self._library.lanes
        return -(-v.shape[2] // lanes) * lanes

    def _add_pages(self, layer: int | None, state: _Layer, k: Tensor, v: Tensor) -> None:
        assert layer is not None
        kv_heads, d = k.shape[1:]
        state.keys = lazy_zeros((self.num_blocks, kv_heads, d, self.block_size), self.page_dtype, CPU)
        state.values = lazy_zeros((self.num_blocks, kv_heads, self.block_size, self._width(v)), self.page_dtype, CPU)
        state.call.keys, state.call.values = state.keys.data_ptr(), state.values.data_ptr()
        state.call.page_dtype = POOL_DTYPES.index(self.page_dtype)
        self._layer_bytes[layer] = (state.keys.nbytes + state.values.nbytes) // self.num_blocks


def native_context(spans: Sequence[Span]) -> NativeContext:
    """Of one packed row."""
    rows: list[tuple[int, int, int, int]] = []
    pages: list[int] = []
    for start, end, context, own in spans:
        rows.append((start, end, context, -1 if own is None else len(pages)))
        pages.extend(own or ())
    table, numbers = np.array(rows, np.int32).reshape(-1, 4), np.array(pages, np.int32)
    cached = any(row[3] >= 0 for row in rows)
    return NativeContext(table, numbers, cached, table.ctypes.data, numbers.ctypes.data)


def _check(rope: Rope, q: Tensor) -> None:
    """Raises RuntimeError for angles that the kernels would misread."""
    cos, sin = rope
    same = (sin.stride(), sin.dtype) == (cos.stride(), torch.float32)
    if not fits(rope, q) or cos.stride(1) != 1 or cos.dtype != torch.float32 or not same:
        raise RuntimeError(
            f"angles of shape {tuple(cos.shape)} in {cos.dtype}, with strides {cos.stride()}, for queries of "
            f"{tuple(q.shape)}"
        )


def _rule(call: Attention, rule: Rule) -> None:
    call.scale, call.softcap = rule.scale, rule.softcap or 0.0
    call.causal, call.window = rule.causal, rule.window or 0
    if rule.bias is not None:
        table = rule.bias.table
        call.bias, call.biases, call.before = table.data_ptr(), table.shape[1], rule.bias.before
    else:
        call.bias = None


def _ask(call: Attention, q: Tensor, out: Tensor) -> None:
    call.heads, call.q, call.out = q.shape[1], q.data_ptr(), out.data_ptr()
    call.q_row, call.q_head, _ = q.stride()


def _usable(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        raise RuntimeError(f"the CPU attention takes fp32, not {tensor.dtype}")
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
