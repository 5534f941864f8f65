"""Put fused modules (fused.py) into a patched model that knows nothing of them.

No architecture is named: a part is fused where it is built as expected and gives the same numbers on a probe; the
engine then tests the whole base again, and takes all of it back (`restore`) where the result differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapters.kernels.library import GELU_TANH, SILU, Library
from adapters.layers import LoraLinear
from server.engine.attention import rotate
from server.engine.base_model import BaseModel
from server.engine.fused import FusedAttention, FusedLayer, FusedMLP, FusedNorm, group_of
from server.engine.kv_cache import KVCache

TOLERANCE = 1e-5
SIZES = (1.0, 1000.0)
"""Of a probe's inputs: what a model clamps shows only in large ones."""
PROBE_TOKENS = 8
ATTENTION_PARTS = ["q_proj", "k_proj", "v_proj", "o_proj"]
HEAD_NORMS = ["q_norm", "k_norm"]
MLP_PARTS = ["gate_proj", "up_proj", "down_proj"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a module."""


@torch.inference_mode()
def fuse(base: BaseModel, library: Library, cache: KVCache) -> int:
    """Replace what can be; call after a forward pass, so that `cache.rules` are known. How many modules were."""
    calls = _calls(base, cache)
    count = 0
    inside: set[nn.Module] = set()  # of what is fused already
    for name, module in list(base.model.named_modules()):
        if module in inside:
            continue
        fused = (
            _fused_norm(module, library)
            or _fused_mlp(module, library)
            or _fused_attention(module, library, cache, calls.get(module, []))
        )
        if fused is not None:
            base.model.set_submodule(name, fused)
            inside.update(module.modules())
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
    width = group_of(module, MLP_PARTS[0]).weights[0].d_in
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


def _fused_attention(module: nn.Module, library: Library, cache: KVCache, calls: list[Call]) -> FusedAttention | None:
    rule, head_dim = cache.rules.get(module), getattr(module, "head_dim", None)
    if rule is None or not isinstance(head_dim, int) or not cache.causal or not calls:
        return None
    if not _consists_of(module, ATTENTION_PARTS, {*HEAD_NORMS}) or not _share_input(module, ATTENTION_PARTS[:3]):
        return None
    norms = _head_norms(module, library, head_dim)
    if norms is None:
        return None
    fused = FusedAttention(module, cache, rule, head_dim, norms)
    return fused if all(_asks_the_same(fused, cache, call, size) for call in calls for size in SIZES) else None


def _head_norms(module: nn.Module, library: Library, head_dim: int) -> tuple[FusedNorm, ...] | None:
    """Those of queries and keys, where there are some; None where they are not what the kernels compute."""
    children = dict(module.named_children())
    if children.keys().isdisjoint(HEAD_NORMS):
        return ()
    norms = [_fused_norm(children[name], library) for name in HEAD_NORMS if name in children]
    found = tuple(norm for norm in norms if norm is not None and norm.width == head_dim)
    return found if len(found) == len(HEAD_NORMS) else None


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
    group = group_of(module, parts[0])
    return len(group.weights) == len(parts) and [
        (layer.group is group, layer.index) for layer in layers if isinstance(layer, LoraLinear)
    ] == [(True, i) for i in range(len(parts))]


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """max |a − b| ≤ TOLERANCE · max |b|"""
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
