"""Fused modules: parts of a transformers model computed in few calls of the CPU kernels instead of many of torch's.

A transform over a patched model that knows nothing of it. It names no architecture: a part is fused where it is built
as expected and gives the same numbers on a probe; the engine then tests the whole base again, and takes all of it back
(`restore`) where the result differs. Each fused module keeps the one it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapters.kernels.library import GELU_TANH, SILU, Library
from adapters.layers import LoraGroup, LoraLinear
from server.engine.attention import Rope, Rule
from server.engine.kv_cache import KVCache, layer_index

TOLERANCE = 1e-5
ATTENTION_PARTS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP_PARTS = ["gate_proj", "up_proj", "down_proj"]


class FusedNorm(nn.Module):
    """y = weight · x / √(mean(x²) + eps) in one pass."""

    def __init__(self, library: Library, original: nn.Module, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.original = original
        self._rms_norm = library.rms_norm
        self._weight = weight.contiguous()
        self._weight_address = self._weight.data_ptr()
        self._eps = eps
        self._d = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] fp32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), self._weight_address, self._eps, y.data_ptr(), x.numel() // self._d, self._d)
        return y


class FusedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), gate and up in one call, act and product in another."""

    def __init__(self, library: Library, original: nn.Module, activation: int) -> None:
        super().__init__()
        self.original = original
        self._gated = library.gated
        self._activation = activation
        self._shared = _group(original, "gate_proj")
        self._down = _group(original, "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, hidden]."""
        gate, up = self._shared.compute(x)
        self._gated(gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel(), self._activation)
        return self._down.compute(gate)[0]


class FusedAttention(nn.Module):
    """o(attention(rope(q(x)), rope(k(x)), v(x))), the rotation done where keys are stored and queries read."""

    def __init__(self, original: nn.Module, cache: KVCache, rule: Rule, head_dim: int) -> None:
        super().__init__()
        self.original = original
        self._cache = cache
        self._rule = rule
        self._head_dim = head_dim
        self._layer = layer_index(original, needed=True)
        self._shared = _group(original, "q_proj")
        self._o = _group(original, "o_proj")

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden]; position_embeddings: cos and sin [1, T, head_dim]."""
        del rest  # what the engine never gives: a mask, a cache of transformers
        tokens = hidden_states.shape[1]
        q, k, v = (y.view(tokens, -1, self._head_dim) for y in self._shared.compute(hidden_states))
        cos, sin = position_embeddings
        out = self._cache.attend(self._layer, q, k, v, self._rule, Rope(cos[0], sin[0]))
        return self._o.compute(out.view(1, tokens, -1))[0], None


Fused = FusedNorm | FusedMLP | FusedAttention


@torch.inference_mode()
def fuse(model: nn.Module, library: Library, cache: KVCache) -> int:
    """Replace what can be; call after a forward pass, so that `cache.rules` are known. How many modules were."""
    count = 0
    for name, module in list(model.named_modules()):
        fused = _fused_norm(module, library) or _fused_mlp(module, library) or _fused_attention(module, cache)
        if fused is not None:
            model.set_submodule(name, fused)
            count += 1
    return count


def restore(model: nn.Module) -> None:
    """Put every original back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Fused):
            model.set_submodule(name, module.original)


def _fused_norm(module: nn.Module, library: Library) -> FusedNorm | None:
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    expected = module(x)
    for factor in (weight, 1.0 + weight):  # Gemma's weights are counted from one
        fused = FusedNorm(library, module, factor.detach().float(), eps)
        if _equal(fused(x), expected):
            return fused
    return None


def _fused_mlp(module: nn.Module, library: Library) -> FusedMLP | None:
    if not _consists_of(module, MLP_PARTS, allowed={"act_fn"}) or not _share_input(module, MLP_PARTS[:2]):
        return None
    activation = _activation(getattr(module, "act_fn", None), library)
    return None if activation is None else FusedMLP(library, module, activation)


def _activation(function: Any, library: Library) -> int | None:
    """Which of the library's activations `function` is."""
    if not callable(function):
        return None
    x = torch.linspace(-12.0, 12.0, 97)
    expected = function(x)
    for activation in (SILU, GELU_TANH):
        y = torch.empty_like(x)
        one = torch.ones_like(x)
        library.gated(x.data_ptr(), one.data_ptr(), y.data_ptr(), x.numel(), activation)
        if _equal(y, expected):
            return activation
    return None


def _fused_attention(module: nn.Module, cache: KVCache) -> FusedAttention | None:
    rule, head_dim = cache.rules.get(module), getattr(module, "head_dim", None)
    if rule is None or not isinstance(head_dim, int) or not cache.causal:
        return None
    if not _consists_of(module, ATTENTION_PARTS) or not _share_input(module, ATTENTION_PARTS[:3]):
        return None
    return FusedAttention(module, cache, rule, head_dim)


def _consists_of(module: nn.Module, parts: list[str], allowed: set[str] = frozenset()) -> bool:  # type: ignore[assignment]
    """Whether the module's children are these linear layers, and nothing else that could change the result."""
    children = dict(module.named_children())
    return children.keys() - allowed == set(parts) and all(isinstance(children[part], LoraLinear) for part in parts)


def _share_input(module: nn.Module, parts: list[str]) -> bool:
    """Whether these layers, and no others, are one group in this order."""
    layers = [module.get_submodule(part) for part in parts]
    group = _group(module, parts[0])
    return len(group.weights) == len(parts) and [
        (layer.group is group, layer.index) for layer in layers if isinstance(layer, LoraLinear)
    ] == [(True, i) for i in range(len(parts))]


def _group(module: nn.Module, part: str) -> LoraGroup:
    layer = module.get_submodule(part)
    assert isinstance(layer, LoraLinear)
    return layer.group


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def fused_modules(model: nn.Module) -> Iterator[Fused]:
    """Those that stand in the model now."""
    return (module for module in model.modules() if isinstance(module, Fused))
