"""Put fused modules (fused.py) into a patched model that knows nothing of them.

No architecture is named: a part is fused where it is built as expected and gives the same numbers on a probe; the
engine then tests the whole base again, and takes all of it back (`restore`) where the result differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapters.kernels.library import GELU_TANH, SILU, Library
from adapters.layers import LoraGroup, LoraLinear
from server.engine.attention import fits, rotate
from server.engine.base_model import BaseModel
from server.engine.fused import FusedAttention, FusedLayer, FusedMLP, FusedNorm, Residual
from server.engine.kv_cache import KVCache

TOLERANCE = 1e-5
SIZES = (1.0, 1000.0)
"""Of a probe's inputs: what a model clamps shows only in large ones."""
LAYER_SIZES = (1e-3, *SIZES)
"""Of a whole layer's: beside small ones what its parts add to them is seen."""
PROBE_TOKENS = 8
QKV = (["q_proj", "k_proj", "v_proj"], ["qkv_proj"])
GATE_UP = (["gate_proj", "up_proj"], ["gate_up_proj"])
"""Layers that share an input, or one that computes all of their outputs."""
HEAD_NORMS = ["q_norm", "k_norm"]
ACTIVATIONS = ["act_fn", "activation_fn"]

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
    shared = _shared(module, GATE_UP, ["down_proj"], {*ACTIVATIONS})
    if shared is None:
        return None
    functions = [getattr(module, name) for name in ACTIVATIONS if hasattr(module, name)]
    activation = _activation(functions[0], library) if functions else None
    if activation is None:
        return None
    fused = FusedMLP(library, module, shared, activation)
    if sum(weights.d_out for weights in shared.weights) != 2 * fused.down.weights[0].d_in:
        return None
    inputs = _inputs(shared.weights[0].d_in)
    return fused if all(nearly_equal(fused(x), module(x)) for x in inputs) else None


def _activation(function: Any, library: Library) -> int | None:
    """Which of the library's activations `function` is."""
    if not callable(function):
        return None
    x = torch.linspace(-12.0, 12.0, 97)
    expected = function(x)
    for activation in (SILU, GELU_TANH):
        y = torch.empty_like(x)
        one = torch.ones_like(x)
        library.gated(x.data_ptr(), one.data_ptr(), len(x), y.data_ptr(), 1, len(x), activation)
        if nearly_equal(y, expected):
            return activation
    return None


def _fused_attention(module: nn.Module, library: Library, cache: KVCache, calls: list[Call]) -> FusedAttention | None:
    rule, head_dim = cache.rules.get(module), getattr(module, "head_dim", None)
    if rule is None or not isinstance(head_dim, int) or not cache.causal or not calls:
        return None
    shared, norms = _shared(module, QKV, ["o_proj"], {*HEAD_NORMS}), _head_norms(module, library, head_dim)
    counts = None if shared is None else _head_counts(shared, head_dim, getattr(module, "num_key_value_groups", None))
    if shared is None or norms is None or counts is None:
        return None
    for rotates in (True, False):
        fused = FusedAttention(module, cache, rule, shared, counts, norms, rotates)
        if all(_asks_the_same(fused, cache, call, size) for call in calls for size in SIZES):
            return fused
    return None


def _head_counts(shared: LoraGroup, head_dim: int, queries: Any) -> tuple[int, int, int] | None:
    """Heads of q, k and v; in one layer the first has `queries` for each of the others. None where they do not fit."""
    counts = tuple(weights.d_out // head_dim for weights in shared.weights)
    if len(counts) == 1:
        if not isinstance(queries, int):
            return None
        others = counts[0] // (queries + 2)
        counts = (queries * others, others, others)
    fits = sum(counts) * head_dim == sum(weights.d_out for weights in shared.weights)
    return (counts[0], counts[1], counts[2]) if fits else None


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
        first, second = asked
    except (TypeError, ValueError, RuntimeError, KeyError):
        return False
    if first.rope is not None or first.rule != second.rule:
        return False
    q, k, rope = second.q, second.k, second.rope
    if rope is not None:
        if not fits(rope, q):
            return False
        q, k = rotate(q, rope), rotate(k, rope)
    return all(nearly_equal(a, b) for a, b in ((q, first.q), (k, first.k), (second.v, first.v), (got, expected)))


def _fused_layer(module: nn.Module, cache: KVCache, calls: list[Call]) -> FusedLayer | None:
    """Of a layer whose parts are all fused; which norm stands where, and what factor parts have, is tried."""
    children = [child for child in module.children() if not isinstance(child, nn.Dropout | nn.Identity)]
    norms = [child for child in children if isinstance(child, FusedNorm)]
    attentions = [child for child in children if isinstance(child, FusedAttention)]
    mlps = [child for child in children if isinstance(child, FusedMLP)]
    if len(norms) not in (2, 4) or (len(attentions), len(mlps)) != (1, 1) or len(children) != len(norms) + 2:
        return None
    tries = [_enlarged(call, size) for call in calls for size in LAYER_SIZES]
    expected = [_output(module, cache, call) for call in tries]
    if not expected or any(each is None for each in expected):
        return None
    for attention, mlp in _residuals(module, attentions[0], mlps[0], norms):
        layer = FusedLayer(module, attention, mlp)
        if all(_same(_output(layer, cache, call), each) for call, each in zip(tries, expected, strict=True)):
            return layer
    return None


def _residuals(
    module: nn.Module, attention: FusedAttention, mlp: FusedMLP, norms: list[FusedNorm]
) -> Iterator[tuple[Residual[FusedAttention], Residual[FusedMLP]]]:
    """How the parts of a layer may stand, the usual first: norms in the order in which they were made, no factor."""
    factors = dict.fromkeys((1.0, *(value for value in vars(module).values() if isinstance(value, float))))
    for order, factor in itertools.product(itertools.permutations(norms), factors):
        before, after, before_mlp, after_mlp = order if len(order) == 4 else (order[0], None, order[1], None)
        yield Residual(attention, before, after, factor), Residual(mlp, before_mlp, after_mlp, factor)


def _output(layer: nn.Module, cache: KVCache, call: Call) -> Tensor | None:
    """None: it takes no such call."""
    arguments, named = call
    try:
        with cache.observe():
            output = layer(*arguments, **named)
    except (TypeError, ValueError, RuntimeError, KeyError):
        return None
    return output if isinstance(output, Tensor) else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and nearly_equal(a, b)


def _enlarged(call: Call, size: float) -> Call:
    """The same call with hidden states `size` times as large."""
    arguments, named = call
    if arguments:
        return (arguments[0] * size, *arguments[1:]), named
    return arguments, {**named, "hidden_states": named["hidden_states"] * size}


def _shared(module: nn.Module, choices: Iterable[list[str]], others: list[str], allowed: set[str]) -> LoraGroup | None:
    """The group of these layers, one of `choices`, which share the module's input.

    None where its children are others than these, `others` and what is `allowed`.
    """
    children = dict(module.named_children())
    for parts in choices:
        wanted = [*parts, *others]
        if children.keys() - allowed == set(wanted) and all(isinstance(children[part], LoraLinear) for part in wanted):
            layers = [layer for part in parts if isinstance(layer := children[part], LoraLinear)]
            group = layers[0].group
            places = [(layer.group is group, layer.index) for layer in layers]
            return group if places == [(True, i) for i in range(len(group.weights))] else None
    return None


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """max |a − b| ≤ TOLERANCE · max |b|"""
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
