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
from adapters.kernels.library import Angles, DecoderLayer, Library, NativeResidual, Norm, Row
from adapters.layers import LoraGroup
from adapters.products import NativeProducts
from server.engine.attention import Span
from server.engine.base_model import BaseModel
from server.engine.fused import Fused, FusedLayer, FusedNorm, Residual
from server.engine.fusing import nearly_equal, probe, probe_length, probe_places
from server.engine.kv_cache import KVCache
from server.engine.native_attention import NativeAttention, NativeContext

logger = logging.getLogger(__name__)

IS_FUSED = operator.attrgetter("fused")
NO_ANGLES = -1
"""native/decoder.h: queries and keys are not rotated."""

CosSin = tuple[Tensor, Tensor]
"""cos and sin: [1, T, at most head_dim] each."""


class DecoderStack(nn.Module):
    """The output of the last of `layers` for the input of the first; for what the kernels do not know, layer by layer.

    kinds: for each layer the first that is given the same angles. In the place of the last of these stands the stack;
    `given` holds what those before it were given.

    Engine's thread only.
    """

    def __init__(
        self, library: Library, layers: nn.ModuleList, kinds: Sequence[int], cache: KVCache, backend: NativeAttention
    ) -> None:
        super().__init__()
        self.layers = layers
        self.fused_layers = [layer for layer in layers if isinstance(layer, FusedLayer)]
        self.groups = [group for layer in self.fused_layers for group in layer.groups]
        self.kinds = kinds
        self.place = max(kinds)
        self._widest: dict[int, int] = {}
        """How many numbers of a head the angles of each kind may rotate."""
        for layer, kind in zip(self.fused_layers, kinds, strict=True):
            head_dim = layer.of_attention.part.head_dim
            self._widest[kind] = min(head_dim, self._widest.get(kind, head_dim))
        self.given: dict[int, CosSin] = {}
        self._library = library
        self._cache = cache
        self._backend = backend
        self._scope = self.groups[0].scope
        self._table = (DecoderLayer * len(layers))()
        self._angles = (Angles * (self.place + 1))()
        self._row = Row(angles=ctypes.addressof(self._angles))
        self._row_address = ctypes.addressof(self._row)
        self._generation = -1

    def forward(self, hidden_states: Tensor, position_embeddings: CosSin, **rest: Any) -> Tensor:
        """hidden_states: [1, T, hidden]; position_embeddings: those of this place."""
        del rest  # as in FusedAttention
        given = {**self.given, self.place: position_embeddings}
        self.given.clear()
        if not self._widest.keys() <= given.keys():
            raise RuntimeError("some layers were given no angles")
        context, batch = self._cache.context, self._scope.current
        if context is None or not self._serves(batch):
            for layer, kind in zip(self.layers, self.kinds, strict=True):
                hidden_states = layer(hidden_states, position_embeddings=given[kind])
            return hidden_states
        return self._compute(hidden_states, given, context, batch)

    def _serves(self, batch: LoraBatch | None) -> bool:
        """Whether there is something to compute, and the kernels add the LoRA term to all of it."""
        return (batch is None or bool(batch.num_tokens)) and all(map(IS_FUSED, self.groups))

    def _compute(
        self, hidden: Tensor, given: dict[int, CosSin], context: NativeContext, batch: LoraBatch | None
    ) -> Tensor:
        if self._generation != self._backend.generation:
            self._describe()
        x = hidden.clone(memory_format=torch.contiguous_format)
        tokens = x.shape[:-1].numel()
        held = {kind: self._tell(kind, pair, tokens) for kind, pair in given.items() if kind in self._widest}
        row = self._row
        row.tokens = tokens
        batch = None if batch is None else batch.over(tokens)
        row.segments, row.num_segments = (None, 0) if batch is None else batch.native
        row.spans, row.num_spans, row.pages = context.spans_address, len(context.spans), context.pages_address
        self._library.decode(ctypes.addressof(self._table), len(self._table), self._row_address, x.data_ptr())
        del held
        return x

    def _tell(self, kind: int, pair: CosSin, tokens: int) -> list[Tensor]:
        """Enter angles into the kernels' table: where they lie, which must be held."""
        for angles in pair:
            d = angles.shape[-1]
            if angles.shape != pair[0].shape or angles.shape[:-1] != (1, tokens) or angles.dtype != torch.float32:
                raise RuntimeError(f"angles of shape {tuple(angles.shape)} in {angles.dtype} for {tokens} tokens")
            if d > self._widest[kind] or d % 2:
                raise RuntimeError(f"angles for {d} numbers of a head of {self._widest[kind]}")
        cos, sin = held = [angles[0].contiguous() for angles in pair]
        entry = self._angles[kind]
        entry.cos, entry.sin, entry.row, entry.d = cos.data_ptr(), sin.data_ptr(), cos.shape[1], cos.shape[1]
        return held

    def _describe(self) -> None:
        """Tell the kernels where everything lies."""
        for entry, layer, kind in zip(self._table, self.fused_layers, self.kinds, strict=True):
            attention, mlp = layer.of_attention.part, layer.of_mlp.part
            entry.of_attention, entry.of_mlp = _residual(layer.of_attention), _residual(layer.of_mlp)
            entry.q_norm, entry.k_norm = map(_norm, attention.norms or (None, None))
            entry.qkv, entry.o, entry.gate_up, entry.down = map(_address, layer.groups)
            entry.num_qkv, entry.num_gate_up = len(attention.shared.weights), len(mlp.shared.weights)
            entry.activation = mlp.activation
            entry.angles = kind if attention.rotates else NO_ANGLES
            heads, *others = attention.counts
            k, v = (torch.empty((1, count, attention.head_dim)) for count in others)
            assert attention.layer is not None
            entry.attention = self._backend.describe(attention.layer, attention.rule, heads, k, v)
        self._generation = self._backend.generation


class NoteAngles(nn.Module):
    """Stands for a layer before the stack that is given other angles than that: notes them, and leaves the rest."""

    def __init__(self, place: int, given: dict[int, CosSin]) -> None:
        super().__init__()
        self._place = place
        self._given = given

    def forward(self, hidden_states: Tensor, position_embeddings: CosSin, **rest: Any) -> Tensor:
        del rest
        self._given[self._place] = position_embeddings
        return hidden_states


class StackedLayers(Fused, nn.ModuleList):
    """Stands for a model's layers: one that computes all of them, after as many as are needed to see all angles."""

    def __init__(self, stack: DecoderStack) -> None:
        notes = [NoteAngles(place, stack.given) for place in range(stack.place)]
        nn.ModuleList.__init__(self, [*notes, stack])

    @property
    def original(self) -> nn.Module:
        return self.stack.layers

    @property
    def stack(self) -> DecoderStack:
        *_, stack = self._modules.values()
        assert isinstance(stack, DecoderStack)
        return stack

    def __getitem__(self, index: Any) -> Any:
        """A model may ask for as many as its configuration says."""
        return self if isinstance(index, slice) else nn.ModuleList.__getitem__(self, index)


def _residual(residual: Residual[Any]) -> NativeResidual:
    return NativeResidual(_norm(residual.before), _norm(residual.after), residual.factor)


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
    for name, layers, kinds in _chains(base, cache):
        expected = _outputs(base, cache)
        base.model.set_submodule(name, StackedLayers(DecoderStack(library, layers, kinds, cache, backend)))
        if fault := _fault(base, cache, expected):
            base.model.set_submodule(name, layers)
            logger.warning("layers are computed one by one: together they %s", fault)
        else:
            found = True
    return found


def _chains(base: BaseModel, cache: KVCache) -> Iterator[tuple[str, nn.ModuleList, list[int]]]:
    """Lists of fused layers on packed weights of which each takes what the one before it gave; DecoderStack.kinds."""
    for name, layers in list(base.model.named_modules()):
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
        groups = [group for layer in fused for group in layer.groups]
        native = all(isinstance(group.products, NativeProducts) for group in groups)
        one_scope = len({id(group.scope) for group in groups}) == 1
        if len(fused) == len(layers) and native and one_scope and (kinds := _follow(base, cache, fused)):
            yield name, layers, kinds


def _follow(base: BaseModel, cache: KVCache, layers: Sequence[FusedLayer]) -> list[int]:
    """DecoderStack.kinds; none where the model does something between these layers."""
    seen: list[tuple[Tensor, Any, Any]] = []
    order: list[nn.Module] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = arguments[0] if arguments else named["hidden_states"]
        order.append(module)
        seen.append((given, named.get("position_embeddings"), output))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with cache.observe():
            probe(base, 0)
    finally:
        for hook in hooks:
            hook.remove()
    if order != [*layers] or any(b[0] is not a[2] for a, b in itertools.pairwise(seen)):
        return []
    angles = [id(each) for _, each, _ in seen if each is not None]
    return [angles.index(each) for each in angles] if len(angles) == len(layers) else []


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
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return f"fail: {error}"
    return "" if all(nearly_equal(a, b) for a, b in zip(got, expected, strict=True)) else "give other numbers"
