"""Attention by torch operations: any device and dtype. Pages are gathered, and short sequences padded together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from server.engine.attention import Rope, Rule, Span, rotate
from server.engine.device import to_device
from server.engine.pages import PagedBackend

T = TypeVar("T")
BIASED_QUERIES = 256
"""Of a span, for which biases by distance are made at once: each takes a number for every head and key."""


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one new token each and about equally many pages, attended together."""

    rows: Tensor  # [n] the token's place in the packed row
    pages: Tensor  # [n · max_pages] page numbers, padded with the sequence's own first
    mask: Tensor  # [n, 1, 1, max_pages · block_size] True: attend
    lengths: Tensor  # [n]


@dataclass(frozen=True)
class TorchContext:
    """What attention needs to know of one packed row."""

    spans: tuple[Span, ...]
    """Sequences attended one by one: prompts, their chunks, and sequences without a cache."""
    span_pages: tuple[Tensor | None, ...]
    decodes: tuple[DecodeGroup, ...]
    cached_rows: Tensor | None  # [c] tokens whose keys and values go into the cache; None: all of them, in order
    cached_slots: Tensor  # [c] page · block_size + offset


class TorchAttention(PagedBackend):
    """An AttentionBackend."""

    def clear(self, pages: Sequence[int]) -> None:
        """A masked position is still multiplied, by zero, and 0 · NaN is NaN: so forget what was there."""
        self.pages.fill(pages)

    def context(self, spans: Sequence[Span], device: torch.device) -> TorchContext:
        decodes = [s for s in spans if s.pages is not None and s.end - s.start == 1 and s.context > 0]
        alone = [s for s in spans if s.pages is None or s.end - s.start > 1 or s.context == 0]
        groups = of_similar_length(decodes, lambda span: span.context)
        cached_rows, cached_slots = self.pages.places(spans, device)
        return TorchContext(
            spans=tuple(alone),
            span_pages=tuple(self._pages_of(span, device) for span in alone),
            decodes=tuple(self._decode_group(group, device) for group in groups),
            cached_rows=cached_rows,
            cached_slots=cached_slots,
        )

    def attend(  # noqa: PLR0913, PLR0917
        self, layer: int | None, q: Tensor, k: Tensor, v: Tensor, rule: Rule, context: TorchContext, rope: Rope | None
    ) -> Tensor:
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        if len(context.cached_slots):
            self.pages.store(layer, k, v, context.cached_rows, context.cached_slots)
        for span, pages in zip(context.spans, context.span_pages, strict=True):
            part = slice(span.start, span.end)
            keys, values = (k[part], v[part]) if pages is None else self._load(layer, pages, span)
            out[part] = attend_span(q[part], keys, values, rule)
        for group in context.decodes:
            out[group.rows] = self._attend_decodes(layer, q[group.rows], group, rule)
        return out

    def _pages_of(self, span: Span, device: torch.device) -> Tensor | None:
        """Pages of a chunk's whole context; None for a sequence that starts in this row."""
        if span.pages is None or span.context == 0:
            return None
        used = -(-(span.context + span.end - span.start) // self.block_size)
        return to_device(device, [span.pages[:used]])[0]

    def _decode_group(self, group: Sequence[Span], device: torch.device) -> DecodeGroup:
        lengths = [span.context + 1 for span in group]
        used = [-(-length // self.block_size) for length in lengths]
        pages = [padded((span.pages or ())[:n], max(used)) for span, n in zip(group, used, strict=True)]
        places, numbers, ends = to_device(device, [[span.start for span in group], pages, lengths])
        mask = torch.arange(max(used) * self.block_size, device=device) < ends[:, None]
        return DecodeGroup(rows=places, pages=numbers.view(-1), mask=mask[:, None, None], lengths=ends)

    def _load(self, layer: int | None, pages: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Keys and values of a chunk and all before it: [context + chunk, kv_heads, d]."""
        assert layer is not None
        n = span.context + span.end - span.start
        return (
            self.pages.keys[layer].index_select(0, pages).flatten(0, 1)[:n],
            self.pages.values[layer].index_select(0, pages).flatten(0, 1)[:n],
        )

    def _attend_decodes(self, layer: int | None, q: Tensor, group: DecodeGroup, rule: Rule) -> Tensor:
        """One token of each of n sequences over its pages: q [n, heads, d] -> [n, heads, d]."""
        assert layer is not None
        n, heads, d = q.shape
        k = self.pages.keys[layer].index_select(0, group.pages)
        v = self.pages.values[layer].index_select(0, group.pages)
        kv_heads = k.shape[2]
        k = k.view(n, -1, kv_heads, d).transpose(1, 2)  # [n, kv_heads, L, d]
        v = v.view(n, -1, kv_heads, v.shape[3]).transpose(1, 2)
        mask = group.mask
        if rule.window is not None:
            oldest = (group.lengths - rule.window)[:, None, None, None]
            mask = mask & (torch.arange(k.shape[2], device=k.device) >= oldest)
        # The heads that share a key stand as that key's queries, so that no key is copied for them.
        bias = None
        if rule.bias is not None:  # [n, kv_heads, heads / kv_heads, L]
            keys = torch.arange(k.shape[2], device=k.device)
            bias = rule.bias.between(group.lengths - 1, keys).transpose(0, 1).reshape(n, kv_heads, -1, len(keys))
        out = _softmax_product(q.view(n, kv_heads, heads // kv_heads, d), k, v, mask, rule, bias)
        return out.reshape(n, heads, -1)


def attend_span(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """The last len(q) positions of a sequence over all of it: q [n, heads, d], k and v [m ≥ n, kv_heads, d].

    Without a cause, a window or a bias, any queries over any keys.
    """
    n, m = len(q), len(k)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, n, d]
    windowed = rule.window is not None and m > rule.window
    if (n == m or not rule.causal) and not windowed and rule.softcap is None and rule.bias is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=rule.causal and n > 1, scale=rule.scale)
    elif rule.bias is None:
        out = _softmax_product(q, k, v, _mask(n, m, rule, q.device), rule, None)
    else:
        mask, places = _mask(n, m, rule, q.device), torch.arange(m, device=q.device)
        parts = [slice(start, start + BIASED_QUERIES) for start in range(0, n, BIASED_QUERIES)]
        out = torch.cat(
            [
                _softmax_product(
                    q[:, :, part], k, v, mask[part], rule, rule.bias.between(places[m - n :][part], places)
                )
                for part in parts
            ],
            dim=2,
        )
    return out[0].transpose(0, 1)


def _mask(n: int, m: int, rule: Rule, device: torch.device) -> Tensor:
    """[n, m]: which of m positions each of the last n may see."""
    queries = torch.arange(m - n, m, device=device)[:, None]
    keys = torch.arange(m, device=device)
    mask = keys <= queries if rule.causal else torch.ones(n, m, dtype=torch.bool, device=device)
    if rule.window is not None:
        mask &= keys > queries - rule.window
        if not rule.causal:
            mask &= keys < queries + rule.window
    return mask


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule, bias: Tensor | None) -> Tensor:  # noqa: PLR0913, PLR0917
    if rule.softcap is None:
        if bias is not None:
            mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (rule.scale / rule.softcap)) * rule.softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def padded(pages: Sequence[int], count: int) -> list[int]:
    return [*pages, *[pages[0]] * (count - len(pages))]


def of_similar_length(rows: Iterable[T], length: Callable[[T], int]) -> list[list[T]]:
    """Groups in which the longest has at most twice the shortest's pages, so that padding stays small."""
    groups: list[list[T]] = []
    for row in sorted(rows, key=length):
        if groups and length(row) <= 2 * length(groups[-1][0]) + 64:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
