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
from server.engine.attention import Rope, Rule, rotate
from server.engine.base_model import BaseModel
from server.engine.kv_cache import KVCache, layer_index

TOLERANCE = 1e-5
SIZES = (1.0, 1000.0)
"""Of a probe's inputs: what a model clamps shows only in large ones."""
PROBE_TOKENS = 8
ATTENTION_PARTS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP_PARTS = ["gate_proj", "up_proj", "down_proj"]


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
        self._d = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] fp32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), self.weight_address, self.eps, y.data_ptr(), x.numel() // self._d, self._d)
        return y

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        """The norm of x + delta; x, contiguous, becomes that sum."""
        assert x.is_contiguous()
        delta = delta.contiguous()
        y = torch.empty_like(x)
        rows = x.numel() // self._d
        self._add_rms_norm(x.data_ptr(), delta.data_ptr(), self.weight_address, self.eps, y.data_ptr(), rows, self._d)
        return y


class FusedMLP(Fused):
    """down(act(gate(x)) · up(x)), gate and up in one call, act and product in another."""

    def __init__(self, library: Library, original: nn.Module, activation: int) -> None:
        super().__init__(original)
        self._gated = library.gated
        self.activation = activation
        self.shared = _group(original, "gate_proj")
        self.down = _group(original, "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, hidden]."""
        gate, up = self.shared.compute(x)
        self._gated(gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel(), self.activation)
        return self.down.compute(gate)[0]


class FusedAttention(Fused):
    """o(attention(rope(q(x)), rope(k(x)), v(x))), the rotation done where keys are stored and queries read."""

    def __init__(self, original: nn.Module, cache: KVCache, rule: Rule, head_dim: int) -> None:
        super().__init__(original)
        self._cache = cache
        self.rule = rule
        self.head_dim = head_dim
        self.layer = layer_index(original, needed=True)
        self.shared = _group(original, "q_proj")
        self.o = _group(original, "o_proj")

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden]; position_embeddings: cos and sin [1, T, head_dim]."""
        del rest  # what the engine never gives: a mask, a cache of transformers
        tokens = hidden_states.shape[1]
        q, k, v = (y.view(tokens, -1, self.head_dim) for y in self.shared.compute(hidden_states))
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


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a module."""


@torch.inference_mode()
def fuse(base: BaseModel, library: Library, cache: KVCache) -> int:
    """Replace what can be; call after a forward pass, so that `cache.rules` are known. How many modules were."""
    calls = _calls(base, cache)
    count = 0
    for name, module in list(base.model.named_modules()):
        fused = (
            _fused_norm(module, library)
            or _fused_mlp(module, library)
            or _fused_attention(module, cache, calls.get(module, []))
        )
        if fused is not None:
            base.model.set_submodule(name, fused)
            count += 1
    for name, module in list(base.model.named_modules()):
        if layer := _fused_layer(module, cache, calls.get(module, [])):
            base.model.set_submodule(name, layer)
            count += 1
    return count


def _calls(base: BaseModel, cache: KVCache) -> dict[nn.Module, list[Call]]:
    """How attention modules, and the layers that they are part of, are called: at the first positions and the last."""
    layers = [m for m in base.body.modules() if any(child in cache.rules for child in m.children())]
    calls: dict[nn.Module, list[Call]] = {module: [] for module in (*cache.rules, *layers)}

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[module].append((arguments, named))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in calls]
    try:
        with cache.observe():
            for first in probe_places(base):
                probe(base, first)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def probe_length(base: BaseModel) -> int:
    return min(PROBE_TOKENS, base.max_positions)


def probe_places(base: BaseModel) -> tuple[int, int]:
    """The first positions and the last."""
    return 0, base.max_positions - probe_length(base)


def probe(base: BaseModel, first: int) -> Tensor:
    """Hidden states [T, hidden] of a short sequence at the positions from `first` on; in a context of the cache."""
    count = probe_length(base)
    ids = torch.arange(count, device=base.device)[None] % base.vocabulary_size
    return base.forward(ids, torch.arange(first, first + count, device=base.device)[None], None)[0]


def restore(model: nn.Module) -> None:
    """Put every original back."""
    while found := next(((n, m) for n, m in model.named_modules() if isinstance(m, Fused)), None):
        name, fused = found  # the outermost: what is fused inside comes back with it, and is found then
        model.set_submodule(name, fused.original)


def _fused_norm(module: nn.Module, library: Library) -> FusedNorm | None:
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    for factor in (weight, 1.0 + weight):  # some weights are counted from one
        fused = FusedNorm(library, module, factor.detach().float(), eps)
        if all(nearly_equal(fused(x), module(x)) for x in _inputs(len(weight))):
            return fused
    return None


def _inputs(width: int) -> list[Tensor]:
    """[1, 3, width]: small, usual and large, so that a clamp is seen."""
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    return [x * factor for factor in (1e-2, *SIZES)]


def _fused_mlp(module: nn.Module, library: Library) -> FusedMLP | None:
    if not _consists_of(module, MLP_PARTS, allowed={"act_fn"}) or not _share_input(module, MLP_PARTS[:2]):
        return None
    activation = _activation(getattr(module, "act_fn", None), library)
    if activation is None:
        return None
    fused = FusedMLP(library, module, activation)
    width = _group(module, MLP_PARTS[0]).weights[0].d_in
    return fused if all(nearly_equal(fused(x), module(x)) for x in _inputs(width)) else None


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
        if nearly_equal(y, expected):
            return activation
    return None


def _fused_attention(module: nn.Module, cache: KVCache, calls: list[Call]) -> FusedAttention | None:
    rule, head_dim = cache.rules.get(module), getattr(module, "head_dim", None)
    if rule is None or not isinstance(head_dim, int) or not cache.causal or not calls:
        return None
    if not _consists_of(module, ATTENTION_PARTS) or not _share_input(module, ATTENTION_PARTS[:3]):
        return None
    fused = FusedAttention(module, cache, rule, head_dim)
    return fused if all(_asks_the_same(fused, cache, call, size) for call in calls for size in SIZES) else None


def _asks_the_same(fused: FusedAttention, cache: KVCache, call: Call, size: float) -> bool:
    """Whether both modules ask the same of attention, and make the same of its answer, for inputs times `size`.

    Attention itself is left out: with large inputs it would turn rounding into other answers.
    """
    arguments, named = _enlarged(call, size)
    try:
        with cache.observe() as asked:
            expected, got = fused.original(*arguments, **named)[0], fused(*arguments, **named)[0]
    except (TypeError, RuntimeError, KeyError):
        return False
    first, second = asked
    rope = second.rope
    if first.rope is not None or rope is None or first.rule != second.rule or rope.cos.shape != rope.sin.shape:
        return False
    if rope.cos.shape != (len(second.q), second.q.shape[-1]):
        return False
    rotated = (rotate(second.q, rope), rotate(second.k, rope), second.v, got)
    return all(nearly_equal(a, b) for a, b in zip(rotated, (first.q, first.k, first.v, expected), strict=True))


def _fused_layer(module: nn.Module, cache: KVCache, calls: list[Call]) -> FusedLayer | None:
    """Of a layer whose four parts are fused; which norm comes first is tried."""
    children = list(module.children())
    norms = [child for child in children if isinstance(child, FusedNorm)]
    attentions = [child for child in children if isinstance(child, FusedAttention)]
    mlps = [child for child in children if isinstance(child, FusedMLP)]
    if (len(children), len(norms), len(attentions), len(mlps)) != (4, 2, 1, 1) or not calls:
        return None
    for first, second in (norms, norms[::-1]):
        layer = FusedLayer(module, (first, attentions[0], second, mlps[0]))
        if all(_gives_the_same(layer, cache, call, size) for call in calls for size in SIZES):
            return layer
    return None


def _gives_the_same(layer: FusedLayer, cache: KVCache, call: Call, size: float) -> bool:
    arguments, named = _enlarged(call, size)
    try:
        with cache.observe():
            expected, got = layer.original(*arguments, **named), layer(*arguments, **named)
    except (TypeError, RuntimeError, KeyError):
        return False
    return isinstance(expected, Tensor) and nearly_equal(got, expected)


def _enlarged(call: Call, size: float) -> Call:
    """The same call with hidden states `size` times as large."""
    arguments, named = call
    if arguments:
        return (arguments[0] * size, *arguments[1:]), named
    return arguments, {**named, "hidden_states": named["hidden_states"] * size}


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


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """max |a − b| ≤ TOLERANCE · max |b|"""
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def fused_modules(model: nn.Module) -> Iterator[Fused]:
    """Those that stand in the model now."""
    return (module for module in model.modules() if isinstance(module, Fused))
