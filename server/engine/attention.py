"""What attention is asked, and what its implementations promise. Knows nothing of adapters, scheduling or tasks.

A packed row [1, T] holds many sequences; attention keeps each to itself: over its own pages where it has a cache,
inside its own tokens where it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Span(NamedTuple):
    """Tokens start … end − 1 of the packed row: positions `context` … of one sequence, after what is cached."""

    start: int
    end: int
    context: int
    pages: Sequence[int] | None
    """None: a sequence without a cache, all of it in this row."""


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """What is added to the scores of a layer, by how far a key stands after its query."""

    table: Tensor  # [heads, n] fp32, the first for a distance of −`before`; beyond its ends it goes on as they are
    before: int

    def between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[heads, n, m] for the positions of queries [n] and keys [m]."""
        distances = keys[None, :] - queries[:, None]
        return self.table[:, (distances + self.before).clamp(0, self.table.shape[1] - 1)]


@dataclass(frozen=True)
class Rule:
    """How scores become weights in one layer: softmax(cap(q kᵀ · scale)) over what a token may see."""

    scale: float
    causal: bool
    window: int | None = None
    """A token sees itself and the window − 1 before it; where not causal, as many after it."""
    softcap: float | None = None
    """cap(s) = softcap · tanh(s / softcap)"""
    bias: RelativeBias | None = None
    """Added to scores; not with a soft cap."""


class Rope(NamedTuple):
    """Rotary positions still to be applied to the first n numbers of heads: x · cos + rotate_half(x) · sin."""

    cos: Tensor  # [T, n], n even and at most d
    sin: Tensor  # [T, n]


def fits(rope: Rope, q: Tensor) -> bool:
    """Whether there are angles for all tokens of q [T, heads, d], and for no more than its heads have."""
    cos, sin = rope
    if cos.dim() != 2 or cos.shape != sin.shape or len(cos) != len(q):
        return False
    return cos.shape[1] <= q.shape[-1] and cos.shape[1] % 2 == 0


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [T, heads, d], the first n numbers of each head rotated."""
    rotated = rope.cos.shape[-1]
    near, far = x[..., :rotated].chunk(2, dim=-1)
    turned = x[..., :rotated] * rope.cos[:, None] + torch.cat((-far, near), dim=-1) * rope.sin[:, None]
    return torch.cat((turned, x[..., rotated:]), dim=-1)


class AttentionBackend(Protocol):
    """Keys and values of all pages and all layers, and attention over them. Engine's thread only."""

    @property
    def bytes_per_block(self) -> int:
        """Of all layers; known after the first forward pass with a cache."""
        ...

    def resize(self, num_blocks: int) -> None:
        """Forget all keys and values, and hold `num_blocks` pages from now on."""
        ...

    def clear(self, pages: Sequence[int]) -> None:
        """`pages` are handed out and will be read before they are full."""
        ...

    def context(self, spans: Sequence[Span], device: torch.device) -> Any:
        """The metadata of one forward pass, made once for all layers."""
        ...

    def attend(  # noqa: PLR0913, PLR0917
        self, layer: int | None, q: Tensor, k: Tensor, v: Tensor, rule: Rule, context: Any, rope: Rope | None
    ) -> Tensor:
        """q: [T, heads, d], k: [T, kv_heads, d], v: [T, kv_heads, v_d] -> [T, heads, v_d].

        Stores the keys and values of sequences with pages first. layer: needed where there are any.
        """
        ...
