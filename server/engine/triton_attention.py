"""Attention on CUDA in Triton: over the pages where they lie, without gathers, padding or masks in memory.

Nothing is read before it was written, so that pages need no clearing. Nobody imports this where there is no GPU, for it
needs triton. Not torch's own `varlen_attn` with a block table: that is FlashAttention, which takes 16 bits only and no
softcap, and whose version decides whether it takes pages and of which sizes; this one can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from server.engine.attention import Rope, Rule, Span, rotate
from server.engine.device import to_device
from server.engine.pages import PagedBackend
from server.engine.triton_attention_kernel import attend_kernel

TILE_TOKENS = 16
"""Of a prompt, in one program; with the heads that share a key they are its rows."""
LEAST_ROWS = 16
"""What a matrix product of Triton takes."""


@dataclass(frozen=True)
class Tiles:
    """Pieces of spans, one program each for every kv head."""

    paged: bool
    """Whether keys come from pages, else from the packed row."""
    tokens: int
    """At most, in one tile."""
    table: Tensor
    """[n, 5] int32: first row, rows, position of the first, positions of the sequence so far, and where its keys begin:
    its first page's place in `pages`, or its first row."""


@dataclass(frozen=True)
class TritonContext:
    """What attention needs to know of one packed row."""

    tiles: tuple[Tiles, ...]
    pages: Tensor  # int32
    cached_rows: Tensor | None  # [c] int64, as in Pages.store
    cached_slots: Tensor  # [c] int64


class TritonAttention(PagedBackend):
    """An AttentionBackend for any dtype, page size and head size.

    A sequence's result does not depend on its neighbours, bit for bit: each tile is one sequence's, and no sum over its
    keys is split. So one long sequence alone does not fill a large GPU in decode.
    """

    def clear(self, pages: Sequence[int]) -> None:
        """Nothing to do."""

    def context(self, spans: Sequence[Span], device: torch.device) -> TritonContext:
        """Two copies to the device."""
        cached_rows, cached_slots = self.pages.places(spans, device)
        kinds, pages = cut(spans)
        tables = to_device(device, [pages, *kinds.values()], torch.int32)
        tiles = [Tiles(paged, tokens, table) for (paged, tokens), table in zip(kinds, tables[1:], strict=True)]
        return TritonContext(tuple(tiles), tables[0], cached_rows, cached_slots)

    def decode_tables(self, spans: Sequence[Span]) -> dict[str, list[Any]]:
        """The arguments of `decode_context`, of sequences with pages, a token each."""
        kinds, pages = cut(spans)
        ((kind, tiles),) = kinds.items()
        assert kind == (True, 1)
        return {"tiles": tiles, "pages": pages, "slots": self.pages.slots(spans)[1]}

    def decode_context(self, tiles: Tensor, pages: Tensor, slots: Tensor) -> TritonContext:
        """Of a row of len(tiles) sequences, whatever these tensors hold when attention runs: what a graph captures.

        tiles: as Tiles.table; pages: int32; slots: [n] int64, as in Pages.store.
        """
        return TritonContext((Tiles(True, 1, tiles),), pages, None, slots)

    def attend(  # noqa: PLR0913, PLR0917
        self, layer: int | None, q: Tensor, k: Tensor, v: Tensor, rule: Rule, context: TritonContext, rope: Rope | None
    ) -> Tensor:
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        if len(context.cached_slots):
            self.pages.store(layer, k, v, context.cached_rows, context.cached_slots)
        for tiles in context.tiles:
            if tiles.paged:
                assert layer is not None
                self._launch(q, self.pages.keys[layer], self.pages.values[layer], out, rule, tiles, context.pages)
            else:
                self._launch(q, k[None], v[None], out, rule, tiles, context.pages)
        return out

    def _launch(  # noqa: PLR0913, PLR0917
        self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, rule: Rule, tiles: Tiles, pages: Tensor
    ) -> None:
        """keys: [pages, tokens, kv_heads, d], values as keys."""
        heads, d = q.shape[1:]
        kv_heads, v_d = values.shape[2:]
        group = heads // kv_heads
        attend_kernel[(len(tiles.table), kv_heads)](
            q, keys, values, out, tiles.table, pages,
            *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *out.stride()[:2], rule.scale,
            GROUP=group, D=d, V_D=v_d, PAGED=tiles.paged, BLOCK_SIZE=self.block_size, CAUSAL=rule.causal,
            WINDOW=rule.window or 0, SOFTCAP=rule.softcap or 0.0, TENSOR_CORES=_tensor_cores(q.dtype),
            BLOCK_M=max(LEAST_ROWS, triton.next_power_of_2(tiles.tokens * group)), BLOCK_N=_keys_at_once(q.dtype, d),
            BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK_V=max(16, triton.next_power_of_2(v_d)),
        )  # fmt: skip


def cut(spans: Sequence[Span]) -> tuple[dict[tuple[bool, int], list[tuple[int, int, int, int, int]]], list[int]]:
    """(paged, most tokens in a tile) -> tiles as in Tiles.table, for the kinds that occur; and all spans' pages."""
    kinds: dict[tuple[bool, int], list[tuple[int, int, int, int, int]]] = {}
    pages: list[int] = []
    for start, end, context, own in spans:
        size = 1 if end - start == 1 else TILE_TOKENS
        tiles = kinds.setdefault((own is not None, size), [])
        origin = start if own is None else len(pages)
        length = context + end - start
        for first in range(start, end, size):
            tiles.append((first, min(size, end - first), context + first - start, length, origin))
        pages.extend(own or ())
    return kinds, pages


def _keys_at_once(dtype: torch.dtype, d: int) -> int:
    """So many that they fit, with the queries, into the memory of a processor (tests/test_triton_attention.py)."""
    if dtype == torch.float32:
        return 16
    return 64 if d <= 128 else 32


def _tensor_cores(dtype: torch.dtype) -> bool:
    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        return False  # the interpreter holds bf16 as integers and would multiply those
    return dtype != torch.float32
