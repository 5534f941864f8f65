"""A decoder's layers in one call of the CPU kernels, where all of them are fused and follow one another directly.

Between the kernels of a layer Python and torch take longer than a step of few rows can bear: here they are left once
for all layers. Chained when weights are packed; kept where the whole base gives the same numbers.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.batch import LoraBatch
from adapters.kernels.library import DecoderLayer, Library, Norm, Row
from adapters.layers import LoraGroup
from adapters.products import NativeProducts
from server.engine.attention import Span
from server.engine.base_model import BaseModel
from server.engine.fused import Fused, FusedLayer, FusedNorm
from server.engine.fusing import nearly_equal, probe, probe_length, probe_places
from server.engine.kv_cache import KVCache
from server.engine.native_attention import NativeAttention, NativeContext

logger = logging.getLogger(__name__)

IS_FUSED = operator.attrgetter("fused")


class DecoderStack(nn.Module):
    """The output of the last of `layers` for the input of the first; for what the kernels do not know, layer by layer.

    Engine's thread only.
    """

    def __init__(self, library: Library, layers: nn.ModuleList, cache: KVCache, backend: NativeAttention) -> None:
        super().__init__()
        self.layers = layers
        self.parts = [layer.parts for layer in layers if isinstance(layer, FusedLayer)]
        self.groups = [group for parts in self.parts for group in _groups(parts)]
        self._library = library
        self._cache = cache
        self._backend = backend
        self._scope = self.groups[0].scope
        self._table = (DecoderLayer * len(layers))()
        self._row = Row()
        self._row_address = ctypes.addressof(self._row)
        self._generation = -1

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any) -> Tensor:
        """hidden_states: [1, T, hidden]; position_embeddings: cos and sin [1, T, head_dim]."""
        del rest  # as in FusedAttention
        context, batch = self._cache.context, self._scope.current
        if context is None or not self._serves(batch):
            for layer in self.layers:
                hidden_states = layer(hidden_states, position_embeddings=position_embeddings)
            return hidden_states
        return self._compute(hidden_states, position_embeddings, context, batch)

    def _serves(self, batch: LoraBatch | None) -> bool:
        """Whether there is something to compute, and the kernels add the LoRA term to all of it."""
        return (batch is None or bool(batch.num_tokens)) and all(map(IS_FUSED, self.groups))

    def _compute(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], context: NativeContext, batch: LoraBatch | None
    ) -> Tensor:
        if self._generation != self._backend.generation:
            self._describe()
        x = hidden.clone(memory_format=torch.contiguous_format)
        tokens = x.shape[:-1].numel()
        cos, sin = (self._angles(each, tokens) for each in angles)
        row = self._row
        row.tokens, row.cos, row.sin, row.rope_row = tokens, cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        batch = None if batch is None else batch.over(tokens)  # held until the call ends, as its segments must be
        row.segments, row.num_segments = (None, 0) if batch is None else batch.native
        row.spans, row.num_spans, row.pages = context.spans_address, len(context.spans), context.pages_address
        self._library.decode(ctypes.addressof(self._table), len(self._table), self._row_address, x.data_ptr())
        return x

    def _angles(self, angles: Tensor, tokens: int) -> Tensor:
        attention = self.parts[0][1]
        if angles.shape != (1, tokens, attention.head_dim) or angles.dtype != torch.float32:
            raise RuntimeError(f"angles of shape {tuple(angles.shape)} in {angles.dtype} for {tokens} tokens")
        return angles[0].contiguous()

    def _describe(self) -> None:
        """Tell the kernels where everything lies."""
        for layer, (first, attention, second, mlp) in zip(self._table, self.parts, strict=True):
            layer.first, layer.second = _norm(first), _norm(second)
            layer.q_norm, layer.k_norm = map(_norm, attention.norms or (None, None))
            layer.qkv, layer.o = _address(attention.shared), _address(attention.o)
            layer.gate_up, layer.down = _address(mlp.shared), _address(mlp.down)
            layer.activation = mlp.activation
            d = attention.head_dim
            heads, *others = (weights.d_out // d for weights in attention.shared.weights)
            k, v = (torch.empty((1, n, d)) for n in others)
            assert attention.layer is not None
            layer.attention = self._backend.describe(attention.layer, attention.rule, heads, k, v)
        self._generation = self._backend.generation


class StackedLayers(Fused, nn.ModuleList):
    """Stands for a model's layers: one that computes all of them."""

    def __init__(self, stack: DecoderStack) -> None:
        nn.ModuleList.__init__(self, [stack])

    @property
    def original(self) -> nn.Module:
        return self.stack.layers

    @property
    def stack(self) -> DecoderStack:
        stack = self._modules["0"]
        assert isinstance(stack, DecoderStack)
        return stack

    def __getitem__(self, index: Any) -> Any:
        """A model may ask for as many as its configuration says."""
        return self if isinstance(index, slice) else nn.ModuleList.__getitem__(self, index)


def _groups(parts: tuple[Any, Any, Any, Any]) -> tuple[LoraGroup, ...]:
    _, attention, _, mlp = parts
    return (attention.shared, attention.o, mlp.shared, mlp.down)


def _norm(norm: FusedNorm | None) -> Norm:
    return Norm() if norm is None else Norm(norm.weight_address, norm.eps)


def _address(group: LoraGroup) -> int:
    assert isinstance(group.products, NativeProducts)
    return group.products.address


@torch.inference_mode()
def chain(base: BaseModel, library: Library, cache: KVCache) -> bool:
    """Put a StackedLayers for every list of layers for which it is right; whether there was one. Weights are packed."""
    backend, found = cache.backend, False
    if not isinstance(backend, NativeAttention):
        return False
    for name, layers in _chains(base, cache):
        expected = _outputs(base, cache)
        base.model.set_submodule(name, StackedLayers(DecoderStack(library, layers, cache, backend)))
        if fault := _fault(base, cache, expected):
            base.model.set_submodule(name, layers)
            logger.warning("layers are computed one by one: together they %s", fault)
        else:
            found = True
    return found


def _chains(base: BaseModel, cache: KVCache) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of fused layers on packed weights of which each takes what the one before it gave, and the same angles."""
    for name, layers in list(base.model.named_modules()):
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
        groups = [group for layer in fused for group in _groups(layer.parts)]
        native = all(isinstance(group.products, NativeProducts) for group in groups)
        one_scope = len({id(group.scope) for group in groups}) == 1
        if len(fused) == len(layers) and native and one_scope and _follow(base, cache, fused):
            yield name, layers


def _follow(base: BaseModel, cache: KVCache, layers: Sequence[FusedLayer]) -> bool:
    """Whether the model does nothing between these layers."""
    seen: list[tuple[Tensor, Any, Any]] = []

    def note(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = arguments[0] if arguments else named["hidden_states"]
        seen.append((given, named.get("position_embeddings"), output))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with cache.observe():
            probe(base, 0)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(layers) or seen[0][1] is None:
        return False
    return all(b[0] is a[2] and b[1] is a[1] for a, b in itertools.pairwise(seen))


def _outputs(base: BaseModel, cache: KVCache) -> list[Tensor]:
    """Hidden states of one short sequence, at the first positions and at the last."""
    outputs = []
    for first in probe_places(base):
        with cache.use([Span(0, probe_length(base), 0, None)], base.device):
            outputs.append(probe(base, first))
    return outputs


def _fault(base: BaseModel, cache: KVCache, expected: Sequence[Tensor]) -> str:
    """What is wrong with the base as it is now; a model that looks for each of its layers does not find them."""
    try:
        got = _outputs(base, cache)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        return f"fail: {error}"
    return "" if all(nearly_equal(a, b) for a, b in zip(got, expected, strict=True)) else "give other numbers"
