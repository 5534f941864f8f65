"""The KV cache's tensors, the context of one forward pass, and the attention function given to transformers.

Knows nothing of adapters, scheduling or tasks. A packed row [1, T] holds many sequences; attention here keeps each to
itself: over its own pages where it has a cache, inside its own tokens where it has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from adapters.memory import lazy_zeros

IGNORED_ARGUMENTS = frozenset(
    {"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position", "position_embeddings"}
)
_names = itertools.count()


@dataclass(frozen=True)
class Span:
    """Tokens start … end − 1 of the packed row: positions `context` … of one sequence, after what is cached."""

    start: int
    end: int
    context: int
    pages: Sequence[int] | None
    """None: a sequence without a cache, all of it in this row."""


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one new token each and about equally many pages, attended together."""

    rows: Tensor  # [n] the token's place in the packed row
    pages: Tensor  # [n · max_pages] page numbers, padded with the sequence's own first
    mask: Tensor  # [n, 1, 1, max_pages · block_size] True: attend
    lengths: Tensor  # [n]


@dataclass(frozen=True)
class ForwardContext:
    """What attention needs to know of one packed row."""

    spans: tuple[Span, ...]
    """Sequences attended one by one: prompts, their chunks, and sequences without a cache."""
    span_pages: tuple[Tensor | None, ...]
    decodes: tuple[DecodeGroup, ...]
    cached_rows: Tensor | None  # [c] tokens whose keys and values go into the cache; None: all of them, in order
    cached_slots: Tensor  # [c] page · block_size + offset


class KVCache:
    """Keys and values of all pages, for each layer; and the attention function that uses them.

    keys[layer], values[layer]: [num_blocks, block_size, kv_heads, head_dim], made when the layer first asks, in its
    own shape and dtype. Engine's thread only.
    """

    def __init__(self, num_blocks: int, block_size: int, causal: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.causal = causal
        self.name = f"multilora-{next(_names)}"
        self.current: ForwardContext | None = None
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._layer_bytes: dict[int, int] = {}
        AttentionInterface.register(self.name, self._attend)

    @contextmanager
    def use(self, context: ForwardContext) -> Iterator[None]:
        """Make `context` current; refuses to nest."""
        if self.current is not None:
            raise RuntimeError("a ForwardContext is current already")
        self.current = context
        try:
            yield
        finally:
            self.current = None

    @property
    def bytes_per_block(self) -> int:
        """Of all layers; known after the first forward pass with a cache."""
        return sum(self._layer_bytes.values())

    def resize(self, num_blocks: int) -> None:
        """Forget all keys and values, and hold `num_blocks` pages from now on."""
        self.num_blocks = num_blocks
        self._keys.clear()
        self._values.clear()

    def clear(self, pages: Sequence[int]) -> None:
        """Forget what is in `pages`: a masked position is still multiplied, by zero, and 0 · NaN is NaN."""
        tensors = [*self._keys.values(), *self._values.values()]
        if pages and tensors:
            index = torch.tensor(pages, dtype=torch.long, device=tensors[0].device)
            for tensor in tensors:
                tensor.index_fill_(0, index, 0.0)

    def context(self, spans: Sequence[Span], device: torch.device) -> ForwardContext:
        """Prepare the metadata of one forward pass, once for all layers."""
        decodes = [s for s in spans if s.pages is not None and s.end - s.start == 1 and s.context > 0]
        alone = [s for s in spans if s.pages is None or s.end - s.start > 1 or s.context == 0]
        rows: list[int] = []
        slots: list[int] = []
        for span in spans:
            if span.pages is not None:
                rows.extend(range(span.start, span.end))
                slots.extend(self._slots_of(span))
        whole = bool(spans) and len(rows) == spans[-1].end
        return ForwardContext(
            spans=tuple(alone),
            span_pages=tuple(self._pages_of(span, device) for span in alone),
            decodes=tuple(self._decode_group(group, device) for group in _of_similar_length(decodes)),
            cached_rows=None if whole else torch.tensor(rows, dtype=torch.long, device=device),
            cached_slots=torch.tensor(slots, dtype=torch.long, device=device),
        )

    def _slots_of(self, span: Span) -> Iterator[int]:
        assert span.pages is not None
        for position in range(span.context, span.context + span.end - span.start):
            page, offset = divmod(position, self.block_size)
            yield span.pages[page] * self.block_size + offset

    def _pages_of(self, span: Span, device: torch.device) -> Tensor | None:
        """Pages of a chunk's whole context; None for a sequence that starts in this row."""
        if span.pages is None or span.context == 0:
            return None
        used = -(-(span.context + span.end - span.start) // self.block_size)
        return torch.tensor(span.pages[:used], dtype=torch.long, device=device)

    def _decode_group(self, group: Sequence[Span], device: torch.device) -> DecodeGroup:
        lengths = torch.tensor([span.context + 1 for span in group], dtype=torch.long)
        used = [-(-(span.context + 1) // self.block_size) for span in group]
        pages = [_padded((span.pages or ())[:n], max(used)) for span, n in zip(group, used, strict=True)]
        mask = torch.arange(max(used) * self.block_size) < lengths[:, None]
        return DecodeGroup(
            rows=torch.tensor([span.start for span in group], dtype=torch.long, device=device),
            pages=torch.tensor(pages, dtype=torch.long, device=device).view(-1),
            mask=mask[:, None, None].to(device),
            lengths=lengths.to(device),
        )

    def _attend(  # noqa: PLR0913, PLR0917  -- the signature is transformers'
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """softmax(q kᵀ · scaling) v for each sequence of the current context.

        query: [1, heads, T, head_dim], key and value: [1, kv_heads, T, head_dim]. Returns [1, T, heads, head_dim].
        Raises RuntimeError for an argument that changes the result and is not served.
        """
        context = self.current
        if context is None:
            raise RuntimeError("attention outside a forward pass of the engine")
        unserved = [k for k, v in rest.items() if v is not None and v is not False and k not in IGNORED_ARGUMENTS]
        if unserved or dropout or attention_mask is not None:
            raise RuntimeError(f"this base's attention uses {unserved or 'a mask or dropout'}, which is not served")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rule = _Rule(scale, self.causal, sliding_window, softcap)
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, heads, d]
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        if len(context.cached_slots):
            self._store(module, k, v, context)
        for span, pages in zip(context.spans, context.span_pages, strict=True):
            part = slice(span.start, span.end)
            keys, values = (k[part], v[part]) if pages is None else self._load(module, pages, span)
            out[part] = _attend_span(q[part], keys, values, rule)
        for group in context.decodes:
            out[group.rows] = self._attend_decodes(module, q[group.rows], group, rule)
        return out[None], None

    def _store(self, module: nn.Module, k: Tensor, v: Tensor, context: ForwardContext) -> None:
        layer = _layer_index(module)
        if layer not in self._keys:
            self._keys[layer] = lazy_zeros((self.num_blocks, self.block_size, *k.shape[1:]), k.dtype, k.device)
            self._values[layer] = lazy_zeros((self.num_blocks, self.block_size, *v.shape[1:]), v.dtype, v.device)
            self._layer_bytes[layer] = (self._keys[layer].nbytes + self._values[layer].nbytes) // self.num_blocks
        if context.cached_rows is not None:
            k, v = k[context.cached_rows], v[context.cached_rows]
        self._keys[layer].flatten(0, 1).index_copy_(0, context.cached_slots, k)
        self._values[layer].flatten(0, 1).index_copy_(0, context.cached_slots, v)

    def _load(self, module: nn.Module, pages: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Keys and values of a chunk and all before it: [context + chunk, kv_heads, d]."""
        layer = _layer_index(module)
        n = span.context + span.end - span.start
        return (
            self._keys[layer].index_select(0, pages).flatten(0, 1)[:n],
            self._values[layer].index_select(0, pages).flatten(0, 1)[:n],
        )

    def _attend_decodes(self, module: nn.Module, q: Tensor, group: DecodeGroup, rule: _Rule) -> Tensor:
        """One token of each of n sequences over its pages: q [n, heads, d] -> [n, heads, d]."""
        layer = _layer_index(module)
        n, heads, d = q.shape
        k = self._keys[layer].index_select(0, group.pages)
        v = self._values[layer].index_select(0, group.pages)
        kv_heads = k.shape[2]
        k = k.view(n, -1, kv_heads, d).transpose(1, 2)  # [n, kv_heads, L, d]
        v = v.view(n, -1, kv_heads, v.shape[3]).transpose(1, 2)
        mask = group.mask
        if rule.window is not None:
            oldest = (group.lengths - rule.window)[:, None, None, None]
            mask = mask & (torch.arange(k.shape[2], device=k.device) >= oldest)
        # The heads that share a key stand as that key's queries, so that no key is copied for them.
        out = _softmax_product(q.view(n, kv_heads, heads // kv_heads, d), k, v, mask, rule)
        return out.reshape(n, heads, -1)


@dataclass(frozen=True)
class _Rule:
    """How scores become weights in one layer."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None


def _attend_span(q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> Tensor:
    """The last len(q) positions of a sequence over all of it: q [n, heads, d], k and v [m ≥ n, kv_heads, d]."""
    n, m = len(q), len(k)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, n, d]
    windowed = rule.window is not None and m > rule.window
    if n == m and not windowed and rule.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=rule.causal and n > 1, scale=rule.scale)
    else:
        out = _softmax_product(q, k, v, _mask(n, m, rule, q.device), rule)
    return out[0].transpose(0, 1)


def _mask(n: int, m: int, rule: _Rule, device: torch.device) -> Tensor:
    """[n, m]: which of m positions each of the last n may see."""
    queries = torch.arange(m - n, m, device=device)[:, None]
    keys = torch.arange(m, device=device)
    mask = keys <= queries if rule.causal else torch.ones(n, m, dtype=torch.bool, device=device)
    if rule.window is not None:
        mask &= keys > queries - rule.window
        if not rule.causal:
            mask &= keys < queries + rule.window
    return mask


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: _Rule) -> Tensor:
    if rule.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (rule.scale / rule.softcap)) * rule.softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def _layer_index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise RuntimeError(f"{type(module).__name__} has no layer_idx: this base is not served")
    return index


def _padded(pages: Sequence[int], count: int) -> list[int]:
    return [*pages, *[pages[0]] * (count - len(pages))]


def _of_similar_length(spans: Sequence[Span]) -> list[list[Span]]:
    """Groups in which the longest has at most twice the shortest's pages, so that padding stays small."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: s.context):
        if groups and span.context <= 2 * groups[-1][0].context + 64:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
