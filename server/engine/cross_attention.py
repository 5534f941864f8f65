"""CrossAttention: keys and values of encoders' outputs in pages, and decoders' attention over them.

A sequence's pages hold both: here those of its source, in the cache's backend those of its target. Knows nothing of
adapters or scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from server.engine.attention import Rule, Span
from server.engine.device import to_device
from server.engine.pages import PagedBackend
from server.engine.torch_attention import attend_span, of_similar_length, padded


class Look(NamedTuple):
    """Tokens start … end − 1 of the target's packed row see all `length` tokens of a source, which lies in `pages`."""

    start: int
    end: int
    pages: Sequence[int]
    length: int


@dataclass(frozen=True)
class _Group:
    """Target tokens whose sources have about equally many pages, attended together."""

    rows: Tensor  # [n]
    pages: Tensor  # [n · max_pages] padded with the source's own first
    mask: Tensor  # [n, 1, 1, max_pages · block_size] True: attend


@dataclass(frozen=True)
class CrossContext:
    """Of one forward pass of decoders."""

    groups: tuple[_Group, ...]
    spans: tuple[tuple[Look, Tensor], ...]
    """Several tokens of one target, with the pages of its source."""
    stored_rows: Tensor | None
    stored_slots: Tensor  # [s] page · block_size + offset of each new source token


class CrossAttention(Protocol):
    """Of one base. Engine's thread only."""

    @property
    def bytes_per_block(self) -> int:
        """Of all layers that have stored anything."""
        ...

    def resize(self, num_blocks: int) -> None:
        """Forget all keys and values, and hold `num_blocks` pages from now on."""
        ...

    def clear(self, pages: Sequence[int]) -> None:
        """`pages` are handed out and will be read before they are full."""
        ...

    def context(self, looks: Sequence[Look], sources: Sequence[Span], device: torch.device) -> Any:
        """The metadata of one pass of decoders. sources: the new ones' tokens in the encoder's packed row, each with
        its pages."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule, context: Any) -> Tensor:  # noqa: PLR0913, PLR0917
        """softmax(q kᵀ · scale) v over each token's own source -> [T, heads, v_d].

        q: [T, heads, d] of the target's row; k: [S, kv_heads, d], v: [S, kv_heads, v_d] of the new sources, which are
        stored first; anything where there are none.
        """
        ...


class TorchCrossAttention(PagedBackend):
    """By torch operations; any device and dtype."""

    def clear(self, pages: Sequence[int]) -> None:
        """A masked position is still multiplied, by zero, and 0 · NaN is NaN."""
        self.pages.fill(pages)

    def context(self, looks: Sequence[Look], sources: Sequence[Span], device: torch.device) -> CrossContext:
        rows, slots = self.pages.places(sources, device)
        single = [look for look in looks if look.end - look.start == 1]
        groups = [self._group(group, device) for group in of_similar_length(single, lambda look: look.length)]
        spans = [
            (look, to_device(device, [look.pages[: self._count(look)]])[0])
            for look in looks
            if look.end - look.start > 1
        ]
        return CrossContext(tuple(groups), tuple(spans), rows, slots)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule, context: CrossContext) -> Tensor:  # noqa: PLR0913, PLR0917
        if len(context.stored_slots):
            self.pages.store(layer, k, v, context.stored_rows, context.stored_slots)
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        out = q.new_empty(*q.shape[:2], values.shape[-1])
        for group in context.groups:
            n = len(group.rows)
            own_k, own_v = (  # [n, kv_heads, L, d]
                held.index_select(0, group.pages).view(n, -1, *held.shape[2:]).transpose(1, 2)
                for held in (keys, values)
            )
            own_q = q[group.rows].view(n, keys.shape[2], -1, q.shape[2])
            result = F.scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=group.mask, scale=rule.scale)
            out[group.rows] = result.reshape(n, q.shape[1], -1)
        for look, pages in context.spans:
            own_k, own_v = (held.index_select(0, pages).flatten(0, 1)[: look.length] for held in (keys, values))
            out[look.start : look.end] = attend_span(q[look.start : look.end], own_k, own_v, rule)
        return out

    def _count(self, look: Look) -> int:
        return -(-look.length // self.block_size)

    def _group(self, looks: Sequence[Look], device: torch.device) -> _Group:
        most = max(map(self._count, looks))
        pages = [padded(look.pages[: self._count(look)], most) for look in looks]
        rows, numbers, lengths = to_device(
            device, [[look.start for look in looks], pages, [look.length for look in looks]]
        )
        mask = torch.arange(most * self.block_size, device=device) < lengths[:, None]
        return _Group(rows, numbers.view(-1), mask[:, None, None])
