"""Pages: keys and values of all layers in pages of `block_size` tokens. Knows nothing of how attention is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.memory import lazy_zeros
from server.engine.attention import Span
from server.engine.device import to_device


class Pages:
    """keys[layer], values[layer]: [num_blocks, block_size, kv_heads, head_dim], made when a layer first stores.

    Each in its layer's own shape and dtype. Engine's thread only.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._layer_bytes: dict[int, int] = {}

    @property
    def bytes_per_block(self) -> int:
        """Of all layers that have stored anything."""
        return sum(self._layer_bytes.values())

    def resize(self, num_blocks: int) -> None:
        """Forget all keys and values."""
        self.num_blocks = num_blocks
        self.keys.clear()
        self.values.clear()

    def fill(self, pages: Sequence[int]) -> None:
        """Zeros in these pages."""
        tensors = (*self.keys.values(), *self.values.values())
        if pages and tensors:
            (index,) = to_device(tensors[0].device, [pages])
            for tensor in tensors:
                tensor.index_fill_(0, index, 0.0)

    def store(self, layer: int | None, k: Tensor, v: Tensor, rows: Tensor | None, slots: Tensor) -> None:
        """Keys [T, kv_heads, d] and values [T, kv_heads, v_d] of `rows` ([n] int64; None: all) to their `slots`.

        slots: [n] int64, page · block_size + offset of each row.
        """
        assert layer is not None
        if rows is not None:
            k, v = k[rows], v[rows]
        if layer not in self.keys:
            self.keys[layer] = lazy_zeros((self.num_blocks, self.block_size, *k.shape[1:]), k.dtype, k.device)
            self.values[layer] = lazy_zeros((self.num_blocks, self.block_size, *v.shape[1:]), v.dtype, v.device)
            self._layer_bytes[layer] = (self.keys[layer].nbytes + self.values[layer].nbytes) // self.num_blocks
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, v)

    def places(self, spans: Sequence[Span], device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Rows of the packed row whose keys are to be stored (None: all, in order), and their slots (see `store`)."""
        rows, slots = self.slots(spans)
        whole = bool(spans) and len(rows) == spans[-1].end
        placed, *rest = to_device(device, [slots] if whole else [slots, rows])
        return (rest[0] if rest else None), placed

    def slots(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Rows of the packed row whose keys are to be stored, and their slots (see `store`)."""
        rows: list[int] = []
        slots: list[int] = []
        for span in spans:
            if span.pages is None:
                continue
            rows.extend(range(span.start, span.end))
            for position in range(span.context, span.context + span.end - span.start):
                page, offset = divmod(position, self.block_size)
                slots.append(span.pages[page] * self.block_size + offset)
        return rows, slots


class PagedBackend:
    """What AttentionBackends over such pages have in common."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pages = Pages(num_blocks, block_size)
        self.block_size = block_size

    @property
    def bytes_per_block(self) -> int:
        return self.pages.bytes_per_block

    def resize(self, num_blocks: int) -> None:
        self.pages.resize(num_blocks)
