"""DoRA: y = g ⊙ (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias with g = m / ‖W + scaling · B A‖, a number for each output.

Source: "DoRA: Weight-Decomposed Low-Rank Adaptation"; peft/tuners/lora/dora.py. Knows nothing of slots or checkpoints.
The norms are those of whole rows, and W may be packed when an adapter comes, but

    ‖W_o + scaling · (B A)_o‖² = ‖W_o‖² + 2 scaling · B_o · (A Wᵀ)_o + scaling² · B_o A Aᵀ B_oᵀ

needs of it only norms that are known from the start, and the base's own product with the rows of A as its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adapters.batch import LoraBatch
from adapters.kernels.contract import LoraTerm, LoraWeights

Multiply = Callable[[Tensor], Sequence[Tensor]]
"""x [n, d_in] -> x Wᵀ + bias [n, d_out] of each layer of a group: the base's alone."""


class Magnitudes:
    """Turns the magnitudes m of adapters into g, on one base. Engine's thread only."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        """Reads every weight once, before it is packed."""
        self._squares = {name: _squared_norms(linear.weight) for name, linear in linears.items()}
        self._dtypes = {name: linear.weight.dtype for name, linear in linears.items()}
        self._groups: list[tuple[tuple[str, ...], Multiply]] = []

    def use(self, names: Sequence[str], multiply: Multiply) -> None:
        """From now on `multiply` gives the base's products of the layers `names`, which share an input."""
        self._groups.append((tuple(names), multiply))

    @torch.no_grad()
    def divide(self, terms: Mapping[str, LoraTerm], biases: Mapping[str, Tensor]) -> None:
        """In place, gain = m becomes gain = g, in all of `terms`, by layer. biases: the base's.

        The layers of a group are multiplied together, so that W is read once.
        """
        for names, multiply in self._groups:
            mine = [(index, name) for index, name in enumerate(names) if name in terms]
            if not mine:
                continue
            rows = torch.cat([terms[name].a for _, name in mine]).to(self._dtypes[mine[0][1]])
            ends = 0
            products = multiply(rows)
            for index, name in mine:
                term, start = terms[name], ends
                ends += len(term.a)
                product = products[index][start:ends].double()  # [rank, d_out]: A Wᵀ, and the bias
                if name in biases:
                    product -= biases[name]
                assert term.gain is not None
                term.gain.div_(_adapted_norms(self._squares[name], product, term).float())


def rescale(y: Tensor, weights: LoraWeights, batch: LoraBatch) -> None:
    """In place, y[t] = gain ⊙ y[t] + shift for tokens whose slot holds a term with a gain. y: [T, d_out]."""
    for slot, start, end in batch.segments:
        term = weights.terms[slot]
        if term is None or term.gain is None:
            continue
        part = y[start:end]
        part.mul_(term.gain)
        if term.shift is not None:
            part.add_(term.shift)


def _squared_norms(weight: Tensor) -> Tensor:
    """[d_out] fp64: ‖W_o‖² of each row."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)
    return norms.double().square()


def _adapted_norms(squares: Tensor, product: Tensor, term: LoraTerm) -> Tensor:
    """[d_out] fp64: ‖W_o + scaling · (B A)_o‖; product: A Wᵀ [rank, d_out]."""
    a, b = term.a.double(), term.b.double() * term.scaling  # [rank, d_in], [rank, d_out]
    gram = a @ a.T  # [rank, rank]
    adapted = squares + (2 * b * product).sum(0) + (b * (gram @ b)).sum(0)
    return adapted.clamp_min(0).sqrt()
