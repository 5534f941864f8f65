"""Fused modules: parts of a transformers model computed in few calls of the CPU kernels instead of many of torch's.

Each keeps the module that it stands for. fusing.py finds out where one may stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
    """down(act(gate(x)) · up(x)), gate and up in one call, act and product in another.

    shared: gate and up, or one layer that computes both, gate first.
    """

    def __init__(self, library: Library, original: nn.Module, shared: LoraGroup, activation: int) -> None:
        super().__init__(original)
        self._gated = library.gated
        self.activation = activation
        self.shared = shared
        self.down = group_of(original, "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, hidden]."""
        outputs = self.shared.compute(x)
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        y = gate if gate.is_contiguous() else torch.empty_like(gate, memory_format=torch.contiguous_format)
        width, stride = y.shape[-1], outputs[0].shape[-1]
        rows = y.numel() // width
        self._gated(gate.data_ptr(), up.data_ptr(), stride, y.data_ptr(), rows, width, self.activation)
        return self.down.compute(y)[0]


class FusedAttention(Fused):
    """o(attention(rope(q(x)), rope(k(x)), v(x))), the rotation done where keys are stored and queries read.

    shared: q, k and v, or one layer that computes the heads of all, in this order. counts: heads of each.
    norms: of each head's queries and keys, before the rotation. rotates: whether there is a rotation.
    """

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        original: nn.Module,
        cache: KVCache,
        rule: Rule,
        shared: LoraGroup,
        counts: tuple[int, int, int],
        norms: tuple[FusedNorm, ...],
        rotates: bool,
    ) -> None:
        super().__init__(original)
        self._cache = cache
        self.rule = rule
        self.shared = shared
        self.counts = counts
        self.norms = norms
        self.rotates = rotates
        self.head_dim = sum(weights.d_out for weights in shared.weights) // sum(counts)
        self.layer = layer_index(original, needed=True)
        self.o = group_of(original, "o_proj")

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden]; position_embeddings: cos and sin [1, T, at most head_dim]."""
        del rest  # what the engine never gives: a mask, a cache of transformers
        tokens = hidden_states.shape[1]
        heads = [y.view(tokens, -1, self.head_dim) for y in self.shared.compute(hidden_states)]
        q, k, v = heads if len(heads) == 3 else torch.split(heads[0], [*self.counts], dim=1)
        if self.norms:
            q, k = (norm(y) for norm, y in zip(self.norms, (q, k), strict=True))
        cos, sin = position_embeddings
        rope = Rope(cos[0], sin[0]) if self.rotates else None
        out = self._cache.attend(self.layer, q, k, v, self.rule, rope)
        return self.o.compute(out.view(1, tokens, -1))[0], None


Part = TypeVar("Part", FusedAttention, FusedMLP)


@dataclass(frozen=True)
class Residual(Generic[Part]):
    """x + factor · after(part(before(x)))"""

    part: Part
    before: FusedNorm
    after: FusedNorm | None = None
    factor: float = 1.0

    def finish(self, y: Tensor) -> Tensor:
        """factor · after(y)"""
        y = y if self.after is None else self.after(y)
        return y if self.factor == 1.0 else y * self.factor


class FusedLayer(Fused):
    """A decoder layer, attention and then the MLP added to x, without the calls between its parts."""

    def __init__(self, original: nn.Module, attention: Residual[FusedAttention], mlp: Residual[FusedMLP]) -> None:
        super().__init__(original)
        self.of_attention, self.of_mlp = attention, mlp

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any) -> Tensor:
        """hidden_states: [1, T, hidden]."""
        del rest
        attention, mlp = self.of_attention, self.of_mlp
        attended, _ = attention.part.forward(attention.before.forward(hidden_states), position_embeddings)
        x = attention.finish(attended)
        normed = mlp.before.add(x, hidden_states)
        return x + mlp.finish(mlp.part.forward(normed))

    @property
    def groups(self) -> tuple[LoraGroup, LoraGroup, LoraGroup, LoraGroup]:
        """Its linear layers, in the order in which they are computed."""
        attention, mlp = self.of_attention.part, self.of_mlp.part
        return attention.shared, attention.o, mlp.shared, mlp.down

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
