"""KVCache: the attention function given to transformers, and the context of the forward pass that is under way.

Knows nothing of adapters, scheduling or tasks; how attention is computed is its backend's matter (attention.py).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engine.attention import AttentionBackend, Rope, Rule, Span
from server.engine.cross_attention import CrossAttention, Look
from server.engine.encoder_decoder import EncoderDecoder

IGNORED_ARGUMENTS = frozenset(
    {"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position", "position_embeddings"}
)
LEARNED_ARGUMENTS = frozenset({"position_bias"})
"""What an encoder-decoder's attention was told, and EncoderDecoder knows."""
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

    def __init__(
        self,
        backend: AttentionBackend,
        causal: bool,
        stacks: EncoderDecoder | None = None,
        cross: CrossAttention | None = None,
    ) -> None:
        """stacks, cross: of an encoder-decoder base; its decoder's attention over its encoder's output."""
        self.backend = backend
        self.causal = causal
        self.stacks = stacks
        self.cross = cross
        self.name = f"multilora-{next(_names)}"
        """Under which transformers knows the attention function."""
        self.rules: dict[nn.Module, Rule] = {}
        """What each attention module last asked for."""
        self.called = False
        """Whether any module has come to it."""
        self._context: Any = None
        self._crossing: Any = None
        self._asked: list[Asked] | None = None
        AttentionInterface.register(self.name, _attend_of(weakref.WeakMethod(self._attend)))

    @property
    def bytes_per_block(self) -> int:
        """Of all layers; known after the first forward pass with a cache."""
        return self.backend.bytes_per_block + (self.cross.bytes_per_block if self.cross else 0)

    def resize(self, num_blocks: int) -> None:
        """Forget all keys and values, and hold `num_blocks` pages from now on."""
        self.backend.resize(num_blocks)
        if self.cross is not None:
            self.cross.resize(num_blocks)

    def clear(self, pages: Sequence[int]) -> None:
        """`pages` are handed out and will be read before they are full."""
        self.backend.clear(pages)
        if self.cross is not None:
            self.cross.clear(pages)

    @contextmanager
    def use(
        self, spans: Sequence[Span], device: torch.device, looks: Sequence[Look] = (), sources: Sequence[Span] = ()
    ) -> Iterator[None]:
        """Make the packed row of `spans` current; refuses to nest.

        looks, sources: of a decoder's pass (CrossAttention.context).
        """
        crossing = None if self.cross is None else self.cross.context(looks, sources, device)
        with self.enter(self.backend.context(spans, device), crossing):
            yield

    @contextmanager
    def enter(self, context: Any, crossing: Any = None) -> Iterator[None]:
        """Make a packed row current by what `backend`, and `cross`, made of it; refuses to nest."""
        if self._context is not None:
            raise RuntimeError("a packed row is current already")
        self._context, self._crossing = context, crossing
        try:
            yield
        finally:
            self._context = self._crossing = None

    @property
    def context(self) -> Any:
        """What the backend knows of the current row; None outside a forward pass, and while attention is observed."""
        return None if self._asked is not None else self._context

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

        query: [1, heads, T, head_dim], key and value: [1, kv_heads, T, head_dim], in a decoder's attention over its
        encoder's output [1, kv_heads, S, head_dim] of the new sources. Returns [1, T, heads, head_dim].
        Raises RuntimeError for an argument that changes the result and is not served.
        """
        self.called = True
        known = IGNORED_ARGUMENTS if self.stacks is None else IGNORED_ARGUMENTS | LEARNED_ARGUMENTS
        unserved = [k for k, v in rest.items() if v is not None and v is not False and k not in known]
        if unserved or dropout or attention_mask is not None:
            raise RuntimeError(f"this base's attention uses {unserved or 'a mask or dropout'}, which is not served")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, heads, d]
        if self.stacks is None:
            rule = self.rules[module] = Rule(scale, self.causal, sliding_window, softcap)
            return self.attend(layer_index(module, self.causal), q, k, v, rule)[None], None
        if module in self.stacks.crossing:
            if sliding_window is not None or softcap is not None:
                raise RuntimeError("attention over an encoder's output with a soft cap or a window is not served")
            return self._cross(module, q, k, v, Rule(scale, False))[None], None
        causal = module not in self.stacks.encoding
        layer = layer_index(module, True) if causal else None
        rule = Rule(scale, causal, sliding_window, softcap, self.stacks.biases.get(module))
        if rule.bias is not None and softcap is not None:
            raise RuntimeError("attention with both a bias by distance and a soft cap is not served")
        return self.attend(layer, q, k, v, rule)[None], None

    def _cross(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        layer = layer_index(module, needed=True)
        assert layer is not None
        if self.cross is None or self._crossing is None:
            raise RuntimeError("attention outside a forward pass of the engine")
        return self.cross.attend(layer, q, k, v, rule, self._crossing)


def _attend_of(method: weakref.WeakMethod[Any]) -> Any:
    """transformers keeps what is registered for ever: a cache must not live so long."""

    def attend(*arguments: Any, **named: Any) -> Any:
        own = method()
        assert own is not None
        return own(*arguments, **named)

    return attend


def layer_index(module: nn.Module, needed: bool) -> int | None:
    """Which layer's pages an attention module has; raises RuntimeError where it does not say so and must."""
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        return index
    if needed:
        raise RuntimeError(f"{type(module).__name__} has no layer_idx: this base is not served")
    return None
