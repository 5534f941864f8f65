"""Fused modules: parts of a transformers model computed in few calls of the CPU kernels instead of many of torch's.

Each keeps the module that it stands for. fusing.py finds out where one may stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapters.kernels.library import Library
from adapters.layers import LoraGroup, LoraLinear
from server.engine.attention import Rope, Rule
from server.engine.kv_cache import KVCache, layer_index


class Fused(nn.Module):
    """Stands in a model for a module, which it keeps."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = original

    @property
    def original(self) -> nn.Module:
        return self._original


class FusedNorm(Fused):
    """y = weight · x / √(mean(x²) + eps) in one pass."""

    def __init__(self, library: Library, original: nn.Module, weight: Tensor, eps: float) -> None:
        super().__init__(original)
        self._rms_norm = library.rms_norm
        self._add_rms_norm = library.add_rms_norm
        self._weight = weight.clone()  # not a part of the mapped checkpoint
        self.weight_address = self._weight.data_ptr()
        self.eps = eps
        self.width = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] fp32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), self.weight_address, self.eps, y.data_ptr(), x.numel() // self.width, self.width)
        return y

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        """The norm of x + delta; x, contiguous, becomes that sum."""
        assert x.is_contiguous()
        delta = delta.contiguous()
        y = torch.empty_like(x)
        addresses = (x.data_ptr(), delta.data_ptr(), self.weight_address)
        self._add_rms_norm(*addresses, self.eps, y.data_ptr(), x.numel() // self.width, self.width)
        return y


class FusedMLP(Fused):
    """down(act(gate(x)) · up(x)), gate and up in one call, act and product in another."""

    def __init__(self, library: Library, original: nn.Module, activation: int) -> None:
        super().__init__(original)
        self._gated = library.gated
        self.activation = activation
        self.shared = group_of(original, "gate_proj")
        self.down = group_of(original, "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, hidden]."""
        gate, up = self.shared.compute(x)
        self._gated(gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel(), self.activation)
        return self.down.compute(gate)[0]


class FusedAttention(Fused):
    """o(attention(rope(q(x)), rope(k(x)), v(x))), the rotation done where keys are stored and queries read.

    norms: of each head's queries and keys, before the rotation.
    """

    def __init__(
        self, original: nn.Module, cache: KVCache, rule: Rule, head_dim: int, norms: tuple[FusedNorm, ...]
    ) -> None:
        super().__init__(original)
        self._cache = cache
        self.rule = rule
        self.head_dim = head_dim
        self.norms = norms
        self.layer = layer_index(original, needed=True)
        self.shared = group_of(original, "q_proj")
        self.o = group_of(original, "o_proj")

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden]; position_embeddings: cos and sin [1, T, head_dim]."""
        del rest  # what the engine never gives: a mask, a cache of transformers
        tokens = hidden_states.shape[1]
        q, k, v = (y.view(tokens, -1, self.head_dim) for y in self.shared.compute(hidden_states))
        if self.norms:
            q, k = (norm(y) for norm, y in zip(self.norms, (q, k), strict=True))
        cos, sin = position_embeddings
        out = self._cache.attend(self.layer, q, k, v, self.rule, Rope(cos[0], sin[0]))
        return self.o.compute(out.view(1, tokens, -1))[0], None


class FusedLayer(Fused):
    """x + attention(norm(x)), and to that mlp(norm(…)) added: a decoder layer without the calls between its parts."""

    def __init__(self, original: nn.Module, parts: tuple[FusedNorm, FusedAttention, FusedNorm, FusedMLP]) -> None:
        super().__init__(original)
        self.parts = parts
        first, attention, second, mlp = parts
        self._first, self._attention, self._mlp = first.forward, attention.forward, mlp.forward
        self._add = second.add

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any) -> Tensor:
        """hidden_states: [1, T, hidden]."""
        del rest
        attended, _ = self._attention(self._first(hidden_states), position_embeddings)
        normed = self._add(attended, hidden_states)
        return attended + self._mlp(normed)

    def __getattr__(self, name: str) -> Any:
        """What the model wants to know of its layer, such as the kind of its attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_original"), name)


def fused_modules(model: nn.Module) -> Iterator[Fused]:
    """Those that stand in the model now."""
    return (module for module in model.modules() if isinstance(module, Fused))


def restore(model: nn.Module) -> None:
    """Put every original back."""
    while found := next(((n, m) for n, m in model.named_modules() if isinstance(m, Fused)), None):
        name, fused = found  # the outermost: what is fused inside comes back with it, and is found then
        model.set_submodule(name, fused.original)


def group_of(module: nn.Module, part: str) -> LoraGroup:
    layer = module.get_submodule(part)
    assert isinstance(layer, LoraLinear)
    return layer.group
