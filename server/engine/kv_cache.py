"""KVCache: the attention function given to transformers, and the context of the forward pass that is under way.

Knows nothing of adapters, scheduling or tasks; how attention is computed is its backend's matter (attention.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engine.attention import AttentionBackend, Rope, Rule, Span

IGNORED_ARGUMENTS = frozenset(
    {"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position", "position_embeddings"}
)
_names = itertools.count()


class Asked(NamedTuple):
    """What attention was asked for one layer; shapes as in KVCache.attend."""

    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule
    rope: Rope | None


class KVCache:
    """One base's attention. Engine's thread only."""

    def __init__(self, backend: AttentionBackend, causal: bool) -> None:
        self.backend = backend
        self.causal = causal
        self.name = f"multilora-{next(_names)}"
        """Under which transformers knows the attention function."""
        self.rules: dict[nn.Module, Rule] = {}
        """What each attention module last asked for."""
        self.called = False
        """Whether any module has come to it."""
        self._context: Any = None
        self._asked: list[Asked] | None = None
        AttentionInterface.register(self.name, self._attend)

    @contextmanager
    def use(self, spans: Sequence[Span], device: torch.device) -> Iterator[None]:
        """Make the packed row of `spans` current; refuses to nest."""
        if self._context is not None:
            raise RuntimeError("a packed row is current already")
        self._context = self.backend.context(spans, device)
        try:
            yield
        finally:
            self._context = None

    @contextmanager
    def observe(self) -> Iterator[list[Asked]]:
        """Meanwhile attention computes nothing: it notes what it is asked, and answers with fixed numbers."""
        self._asked = []
        try:
            yield self._asked
        finally:
            self._asked = None

    def attend(  # noqa: PLR0913, PLR0917
        self, layer: int | None, q: Tensor, k: Tensor, v: Tensor, rule: Rule, rope: Rope | None = None
    ) -> Tensor:
        """Of the current row: q [T, heads, d], k [T, kv_heads, d], v [T, kv_heads, v_d] -> [T, heads, v_d]."""
        if self._asked is not None:
            self._asked.append(Asked(q, k, v, rule, rope))
            return torch.linspace(-1.0, 1.0, q.shape[:2].numel() * v.shape[2], device=q.device).view(*q.shape[:2], -1)
        if self._context is None:
            raise RuntimeError("attention outside a forward pass of the engine")
        return self.backend.attend(layer, q, k, v, rule, self._context, rope)

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
        """softmax(q kᵀ · scaling) v for each sequence of the current row.

        query: [1, heads, T, head_dim], key and value: [1, kv_heads, T, head_dim]. Returns [1, T, heads, head_dim].
        Raises RuntimeError for an argument that changes the result and is not served.
        """
        self.called = True
        unserved = [k for k, v in rest.items() if v is not None and v is not False and k not in IGNORED_ARGUMENTS]
        if unserved or dropout or attention_mask is not None:
            raise RuntimeError(f"this base's attention uses {unserved or 'a mask or dropout'}, which is not served")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rule = self.rules[module] = Rule(scale, self.causal, sliding_window, softcap)
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, heads, d]
        return self.attend(layer_index(module, self.causal), q, k, v, rule)[None], None


def layer_index(module: nn.Module, needed: bool) -> int | None:
    """Which layer's pages an attention module has; raises RuntimeError where it does not say so and must."""
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        return index
    if needed:
        raise RuntimeError(f"{type(module).__name__} has no layer_idx: this base is not served")
    return None
