"""TokenSlots: what the adapter in each slot has of the embedding and of the language-model head.

Knows nothing of where the numbers lie. Written between steps, as LoraSlots is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.adapter import OwnTokens, TokenRows
from adapters.kernels.contract import LoraTerm, LoraWeights
from adapters.layout import BaseLayout


@dataclass(frozen=True)
class Rows:
    """Rows of some tokens."""

    ids: Tensor  # [n] int64, ascending
    rows: Tensor  # [n, d]


@dataclass(frozen=True)
class Own:
    """What one adapter has in the place of one of these layers."""

    whole: Tensor | None = None  # [V, d]
    bias: Tensor | None = None  # [V], of a head with `whole`
    rows: Rows | None = None
    term: LoraTerm | None = None
    """LoRA on `whole`; that on the base's own weights is among LoraWeights."""


class TokenSlots:
    """Of all slots. Engine's thread only, but for clearing."""

    def __init__(self, layout: BaseLayout, output: nn.Linear | None, max_loras: int) -> None:
        """output: the language-model head; None: it is not adapted."""
        self.weights: dict[str, LoraWeights] = {}
        """LoRA on the base's own layers, by name."""
        self.embedding: dict[int, Own] = {}
        """By slot, where there is anything."""
        self.output: dict[int, Own] = {}
        self.embedding_layer = layout.embedding
        self.output_layer = layout.output if output is not None else None
        self._output_bias = None if output is None or output.bias is None else output.bias.detach().float().clone()
        for layer in (self.embedding_layer, self.output_layer):
            if layer is not None:
                self.weights[layer.name] = LoraWeights(layer.shape.d_in, layer.shape.d_out, max_loras)

    def set(self, slot: int, tokens: OwnTokens | None, terms: Mapping[str, LoraTerm]) -> None:
        """Put an adapter's into `slot`. terms: its LoRA, by layer."""
        tokens = tokens or OwnTokens()
        if self.embedding_layer is not None:
            term = terms.get(self.embedding_layer.name)
            self.weights[self.embedding_layer.name].set(slot, term)
            _put(self.embedding, slot, Own(tokens.embedding, None, _rows(tokens.embedding_rows)))
        if self.output_layer is not None:
            term = terms.get(self.output_layer.name)
            if tokens.output is None:
                self.weights[self.output_layer.name].set(slot, term)
                _put(self.output, slot, Own(rows=_rows(tokens.output_rows)))
            else:
                self.weights[self.output_layer.name].set(slot, None)  # it is for another number of tokens
                bias = self._output_bias if tokens.output_bias is None else tokens.output_bias
                _put(self.output, slot, Own(tokens.output, bias, _rows(tokens.output_rows), term))

    def holds(self, slot: int) -> bool:
        """Whether the adapter in `slot` has anything of these layers."""
        lora = any(slot in weights.used for weights in self.weights.values())
        return lora or slot in self.embedding or slot in self.output


def _put(slots: dict[int, Own], slot: int, own: Own) -> None:
    if own.whole is None and own.rows is None:
        slots.pop(slot, None)
    else:
        slots[slot] = own


def _rows(given: TokenRows | None) -> Rows | None:
    if given is None:
        return None
    return Rows(torch.tensor(given.ids, device=given.rows.device), given.rows)
