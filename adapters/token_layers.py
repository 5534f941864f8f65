"""LoraEmbedding and LoraOutput: each token's own adapter on a base's embedding and on its language-model head.

Where no adapter of a batch has anything there, they are the base's own layers, with a look at the batch. Source of what
is computed: peft/tuners/lora/layer.py (Embedding), peft/tuners/trainable_tokens/layer.py, peft/utils/other.py.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.batch import LoraBatch, LoraScope, Segment
from adapters.kernels.contract import LoraWeights
from adapters.layers import Computing, LoraGroup, LoraLinear, is_tied, pack_model
from adapters.layout import BaseLayout
from adapters.products import NativeEmbedding, NativeProducts, PlainProducts
from adapters.slots import LoraSlots
from adapters.token_slots import Own


class LoraEmbedding(nn.Module):
    """y = E[t] + scaling · A[:, t]ᵀ Bᵀ of each token's adapter, or E its own; times what the base's layer scales by.

    Engine's thread only.
    """

    def __init__(self, base: nn.Embedding, weights: LoraWeights, own: dict[int, Own], scope: LoraScope) -> None:
        super().__init__()
        self.base: nn.Module = base
        self.num_embeddings = base.num_embeddings
        self.embedding_dim = base.embedding_dim
        self.weights = weights
        self.own = own
        self.scope = scope
        self._scale: Tensor | float = getattr(base, "embed_scale", 1.0)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] int64, a token of the current batch each -> [..., d]."""
        batch = self.scope.current
        if batch is None or not (self.weights.used or self.own):
            return _as_tensor(self.base(ids))
        segments = [s for s in batch.over(ids.numel()).segments if s.slot in self.own or s.slot in self.weights.used]
        if not segments:
            return _as_tensor(self.base(ids))
        known = torch.where(ids < self.num_embeddings, ids, 0)  # an adapter may know more tokens
        y = _as_tensor(self.base(known))
        rows, flat = y.view(-1, y.shape[-1]), ids.reshape(-1)
        for slot, start, end in segments:
            self._adapt(rows[start:end], flat[start:end], slot)
        return y

    def _adapt(self, y: Tensor, ids: Tensor, slot: int) -> None:
        """One adapter's tokens, in place. y: [n, d], ids: [n]."""
        own, term = self.own.get(slot), self.weights.terms[slot]
        scale = self._scale.to(y.dtype) if isinstance(self._scale, Tensor) else self._scale
        if own is not None and own.whole is not None:
            y.copy_(F.embedding(ids, own.whole) * scale)
        if own is not None and own.rows is not None:
            tokens = own.rows.ids
            places = torch.searchsorted(tokens, ids).clamp_max(len(tokens) - 1)
            found = tokens[places] == ids
            y.copy_(torch.where(found[:, None], own.rows.rows[places] * scale, y))
        if term is not None:
            y.add_(((term.a[:, ids].T.float() @ term.b.float()) * term.scaling).to(y.dtype) * scale)


class LogitsScope:
    """The batch of the rows that a language-model head computes, as long as an adapter in a slot has LoRA on it."""

    def __init__(self, tokens: LoraScope, weights: LoraWeights) -> None:
        self._tokens = tokens
        self._weights = weights

    @property
    def rows(self) -> LoraBatch | None:
        """Of the pass that is under way."""
        batch = self._tokens.current
        return None if batch is None else batch.logits

    @property
    def current(self) -> LoraBatch | None:
        return self.rows if self._weights.used else None


class LoraOutput(nn.Module):
    """logits = h Wᵀ + bias, plus scaling · (h Aᵀ) Bᵀ of each row's adapter; or W its own, or some of its rows.

    Engine's thread only. W is the base's for rows that have none, so that adapters of all kinds share one product.
    """

    def __init__(
        self, linear: nn.Linear, weights: LoraWeights, own: dict[int, Own], scope: LoraScope, computing: Computing
    ) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.own = own
        self.scope = LogitsScope(scope, weights)
        group = LoraGroup(PlainProducts([linear]), [weights], self.scope, computing.add_lora)
        self.layer = LoraLinear(linear, group, 0)

    def forward(self, h: Tensor) -> Tensor:
        """h: [1, n, d] -> [1, n, V]; V: the most tokens that a row knows. What follows a row's own is void."""
        segments = self._own_segments(h)
        if not segments:
            return _as_tensor(self.layer(h))
        flat = h.reshape(-1, h.shape[-1])
        whole = [(own.whole, end - start) for slot, start, end in segments if (own := self.own[slot]).whole is not None]
        width = max(self.out_features, *(len(weight) for weight, _ in whole), 0)
        if sum(count for _, count in whole) == len(flat):
            y = h.new_zeros((*h.shape[:-1], width))  # no row is the base's
        else:
            y = F.pad(_as_tensor(self.layer(h)), (0, width - self.out_features))
        rows = y.view(-1, width)
        for slot, start, end in segments:
            _replace_logits(rows[start:end], flat[start:end], self.own[slot])
        return y

    def _own_segments(self, h: Tensor) -> list[Segment]:
        batch = self.scope.rows if self.own else None
        return [] if batch is None else _those(batch.over(h.shape[:-1].numel()), self.own)


def _those(batch: LoraBatch, slots: Container[int]) -> list[Segment]:
    return [segment for segment in batch.segments if segment.slot in slots]


def _replace_logits(y: Tensor, h: Tensor, own: Own) -> None:
    """One adapter's rows, in place. y: [n, V], h: [n, d]."""
    if own.whole is not None:
        bias = None if own.bias is None else own.bias.to(own.whole.dtype)
        logits = F.linear(h.to(own.whole.dtype), own.whole, bias)
        if own.term is not None:
            term = own.term
            logits += (((h.float() @ term.a.float().T) * term.scaling) @ term.b.float()).to(logits.dtype)
            if term.bias is not None:
                logits += term.bias.to(logits.dtype)
        y[:, : len(own.whole)] = logits
    if own.rows is not None:
        y[:, own.rows.ids] = F.linear(h.to(own.rows.rows.dtype), own.rows.rows).to(y.dtype)


@dataclass(frozen=True)
class TokenLayers:
    """What stands in a model now for these two layers."""

    embedding: LoraEmbedding | None
    output: LoraOutput | None


def output_of(model: nn.Module, layout: BaseLayout) -> nn.Linear | None:
    """The language-model head of a model that is not patched yet."""
    if layout.output is None:
        return None
    linear = model.get_submodule(layout.output.name)
    assert isinstance(linear, nn.Linear)
    return linear


def patch_tokens(
    model: nn.Module, body: nn.Module, slots: LoraSlots, scope: LoraScope, computing: Computing
) -> TokenLayers:
    """Replace embedding and language-model head, as far as `slots` has room for them. Engine's thread, once."""
    embedding = output = None
    tokens = slots.tokens
    if tokens.embedding_layer is not None:
        name = tokens.embedding_layer.name
        base = body.get_submodule(name)
        assert isinstance(base, nn.Embedding)
        embedding = LoraEmbedding(base, tokens.weights[name], tokens.embedding, scope)
        body.set_submodule(name, embedding)
    if tokens.output_layer is not None:
        name = tokens.output_layer.name
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        output = LoraOutput(linear, tokens.weights[name], tokens.output, scope, computing)
        slots.magnitudes.use([name], output.layer.group.base_outputs)
        model.set_submodule(name, output)
    return TokenLayers(embedding, output)


def pack_tokens(layers: TokenLayers, computing: Computing) -> None:
    """Pack the head's weights, where that is served, and of an embedding that is tied to it. Engine's thread, once."""
    embedding, output = layers.embedding, layers.output
    if output is None:
        return
    linear = output.layer.base
    assert isinstance(linear, nn.Linear)
    tied = embedding is not None and is_tied(embedding.base, linear)
    pack_model(output, computing)
    products = output.layer.group.products
    if embedding is not None and tied and isinstance(products, NativeProducts) and not computing.quantize:
        embedding.base = NativeEmbedding(products.panels(0), embedding.num_embeddings, embedding.embedding_dim)


def _as_tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value
